#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
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
  void run(int threads, int64_t items, void (*task)(void*, int64_t), void* context) {
    grow(threads - 1);
    task_ = task;
    context_ = context;
    items_ = items;
    helpers_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    work();
    open_.store(false);
    // A helper that joins from here on sees a closed job and leaves; one that sleeps is not waited for.
    for (int spins = 0; active_.load() > 0; spins++) {
      if (spins < SPINS_BEFORE_YIELD) pause_cpu();
      else std::this_thread::yield();
    }
  }

  std::mutex busy;

 private:
  void work() {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) task_(context_, item);
  }

  void grow(int helpers) {
    while (static_cast<int>(started_) < helpers) {
      int index = started_++;
      std::thread(&Pool::help, this, index).detach();
    }
  }

  void help(int index) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = wait(seen);
      seen = now;
      active_.fetch_add(1);
      if (open_.load() && index < helpers_) work();
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
  int64_t items_ = 0;
  int helpers_ = 0;
  int started_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<bool> open_{false};
  alignas(64) std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
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

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[SCRATCH_SLOTS];

}  // namespace

void run_parallel(int threads, int64_t items, void (*task)(void*, int64_t), void* context) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads > 1) {
    Pool& shared = the_pool();
    std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
    if (lock.owns_lock()) return shared.run(threads, items, task, context);
  }
  for (int64_t item = 0; item < items; item++) task(context, item);
}

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}
