#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int SPINS_BEFORE_SLEEP = 2000;  // about 30 microseconds
constexpr int SPINS_BEFORE_YIELD = 200;

class Pool {
 public:
  // Throws what the first failing item threw; items that nobody has begun by then are left out.
  void run(int threads, int64_t items, void (*task)(void*, int64_t), void* context) {
    threads = 1 + grow(threads - 1);
    task_ = task;
    context_ = context;
    helpers_ = threads - 1;
    for (int64_t i = 0; i < threads; i++)
      shares_[i].store({static_cast<uint32_t>(items * i / threads), static_cast<uint32_t>(items * (i + 1) / threads)});
    open_.store(true);
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    work(0);
    open_.store(false);
    // A helper that joins from here on sees a closed job and leaves; one that sleeps is not waited for.
    for (int spins = 0; active_.load() > 0; spins++) {
      if (spins < SPINS_BEFORE_YIELD) pause_cpu();
      else std::this_thread::yield();
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // No mutex: a task may ask again on the thread that holds it.
  bool enter() { return !busy_.exchange(true); }
  void leave() { busy_.store(false); }

 private:
  // Items that lie together belong to one thread, which walks them in order: what it fetches ahead of its weights is
  // then its own. Who has none left takes the second half of another's.
  struct Range {
    uint32_t begin, end;
  };
  struct alignas(64) Share {
    std::atomic<uint64_t> packed{0};
    static uint64_t pack(Range r) { return static_cast<uint64_t>(r.begin) << 32 | r.end; }
    static Range unpack(uint64_t p) { return {static_cast<uint32_t>(p >> 32), static_cast<uint32_t>(p)}; }
    void store(Range r) { packed.store(pack(r)); }
    // Empty when there is nothing left.
    Range take_first() {
      for (uint64_t now = packed.load();;) {
        const Range r = unpack(now);
        if (r.begin >= r.end) return {0, 0};
        if (packed.compare_exchange_weak(now, pack({r.begin + 1, r.end}))) return {r.begin, r.begin + 1};
      }
    }
    Range take_half() {
      for (uint64_t now = packed.load();;) {
        const Range r = unpack(now);
        if (r.begin >= r.end) return {0, 0};
        const uint32_t middle = r.begin + (r.end - r.begin) / 2;
        if (packed.compare_exchange_weak(now, pack({r.begin, middle}))) return {middle, r.end};
      }
    }
  };

  void work(int index) {
    for (;;) {
      Range taken = shares_[index].take_first();
      for (int i = 1; taken.begin == taken.end && i <= helpers_; i++) {
        taken = shares_[(index + i) % (helpers_ + 1)].take_half();
        if (taken.begin != taken.end) shares_[index].store({taken.begin + 1, taken.end});
      }
      if (taken.begin == taken.end) return;
      try {
        task_(context_, taken.begin);
      } catch (...) {  // leaving a helper's function would end the process, and the caller must wait for its helpers
        give_up(std::current_exception());
      }
    }
  }

  void give_up(std::exception_ptr failure) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failure_) failure_ = std::move(failure);
    for (int i = 0; i <= helpers_; i++) shares_[i].store({0, 0});
  }

  // Helpers there are for a job: fewer than wanted where the system gives no more threads.
  int grow(int helpers) {
    if (static_cast<int>(shares_.size()) <= helpers) shares_ = std::vector<Share>(helpers + 1);  // no helper is in a job
    try {
      for (; started_ < helpers; started_++) std::thread(&Pool::help, this, started_).detach();
    } catch (const std::system_error&) {
    }
    return started_ < helpers ? started_ : helpers;
  }

  void help(int index) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = wait(seen);
      seen = now;
      active_.fetch_add(1);
      if (open_.load() && index < helpers_) work(index + 1);
      active_.fetch_sub(1);
    }
  }

  uint64_t wait(uint64_t seen) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
      uint64_t now = epoch_.load();
      if (now != seen) return now;
      pause_cpu();
    }
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    sleepers_.fetch_sub(1);
    return epoch_.load();
  }

  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int helpers_ = 0;
  int started_ = 0;
  std::vector<Share> shares_;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<bool> busy_{false}, open_{false};
  alignas(64) std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0};
  std::exception_ptr failure_;
  std::mutex sleep_mutex_, failure_mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads outlive static destruction. A forked child has no pool threads and starts anew.
Pool* pool = nullptr;
std::once_flag pool_once;

Pool& the_pool() {
  std::call_once(pool_once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

// The pool is one caller's at a time.
class Visit {
 public:
  explicit Visit(Pool& pool) : pool_(pool.enter() ? &pool : nullptr) {}
  ~Visit() {
    if (pool_) pool_->leave();
  }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;
  Pool* taken() const { return pool_; }

 private:
  Pool* pool_;
};

constexpr int64_t MOST_ITEMS = int64_t{1} << 32;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[SCRATCH_SLOTS];

}  // namespace

void run_parallel(int threads, int64_t items, void (*task)(void*, int64_t), void* context) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads > 1 && items < MOST_ITEMS) {
    const Visit turn(the_pool());
    if (turn.taken()) return turn.taken()->run(threads, items, task, context);
  }
  for (int64_t item = 0; item < items; item++) task(context, item);
}

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers[slot];
  if (!buffer.data || buffer.bytes < bytes) {  // never null, not even for no bytes
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t rounded = (bytes + bytes / 4 + 4096) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}
