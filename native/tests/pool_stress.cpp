// The pool under stress, for a run with the thread sanitizer: many callers, nested calls, exceptions on any thread, threads
// that come and go, a changing number of helpers, forks. Ends with 0 where every item ran exactly as often as it should.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../pool.h"

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::_Exit(1);
}

template <class Task>
void parallel(int threads, int64_t items, const Task& task) {
  run_parallel(
      threads, items, [](void* context, int64_t item) { (*static_cast<const Task*>(context))(item); },
      const_cast<Task*>(&task));
}

// Plain memory: two threads at one item, or a caller that goes on before its helpers are done, is a race.
void every_item_once(int threads, int64_t items) {
  std::vector<int> runs(items, 0);
  parallel(threads, items, [&](int64_t item) { runs[item]++; });
  for (int count : runs) check(count == 1, "every item runs once");
}

void nested(int threads, int64_t items) {
  std::vector<int> runs(items * 8, 0);
  parallel(threads, items, [&](int64_t outer) {
    parallel(threads, 8, [&](int64_t inner) { runs[outer * 8 + inner]++; });
  });
  for (int count : runs) check(count == 1, "every item of a nested call runs once");
}

// Memory that outlives the call is read after an exception: no thread may be in the job any more.
void failing(int threads, int64_t items, int64_t first) {
  std::vector<int> runs(items, 0);
  bool thrown = false;
  try {
    parallel(threads, items, [&](int64_t item) {
      runs[item]++;
      if (item >= first) throw std::runtime_error("item");
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  check(thrown == (first < items), "an exception reaches the caller, on whichever thread it was thrown");
  for (int count : runs) check(count <= 1, "no item runs twice after an exception");
}

void out_of_memory(int threads) {
  bool thrown = false;
  try {
    parallel(threads, 16, [](int64_t item) {
      static_cast<char*>(scratch(SCRATCH_TILE, 4096))[item] = 1;
      if (item % 5 == 4) scratch(SCRATCH_TILE, size_t{1} << 62);
    });
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  check(thrown, "scratch memory that is not to be had is an exception of the caller's");
  parallel(threads, 16, [](int64_t item) { static_cast<char*>(scratch(SCRATCH_TILE, 4096))[item] = 1; });
}

void one_caller(int seed, int rounds) {
  for (int round = 0; round < rounds; round++) {
    const int threads = 1 + (seed + round) % 5;
    const int64_t items = (seed * 7 + round * 13) % 70;
    every_item_once(threads, items);
    nested(threads, items % 9);
    failing(threads, items, round % 3 ? items / 2 : items);
    if (round % 16 == 0) out_of_memory(threads);
    if (round % 32 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // helpers fall asleep
  }
}

void forked() {
  every_item_once(4, 50);
  const pid_t child = fork();
  if (child == 0) {
    every_item_once(4, 50);  // threads of its own: the parent's are not here
    std::_Exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(status == 0, "a forked child has a pool");
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
  const bool forks = count > 2;
  for (int turn = 0; turn < 4; turn++) {  // callers come and go, and their scratch memory with them
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; i++) callers.emplace_back(one_caller, turn * 4 + i, rounds);
    one_caller(turn, rounds);
    for (auto& caller : callers) caller.join();
    if (forks) forked();
  }
  std::puts("the pool held");
}
