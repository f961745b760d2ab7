// Threads and scratch memory shared by every kernel.
#pragma once
#include <cstddef>
#include <cstdint>

// Runs task(context, item) for every item in [0, items), on the caller and up to threads - 1 pool threads: each walks its
// own part of the items in order, then helps the others. Pool threads are started when first needed,
// spin for some tens of microseconds after a job and then sleep. When another thread of the process is inside a job already
// (a task that calls this is such a case), the caller works alone. What a task throws, on whichever thread, is thrown to the
// caller once no thread is in the job any more; of several the first. Items behind it may be left out.
void run_parallel(int threads, int64_t items, void (*task)(void* context, int64_t item), void* context);

// Thread-local memory, page-aligned, that grows and is reused; what it held before is lost. One user a slot. Throws
// std::bad_alloc.
enum ScratchSlot {
  SCRATCH_INPUT, SCRATCH_HIDDEN, SCRATCH_ROUTING, SCRATCH_RESULT, SCRATCH_PANEL, SCRATCH_TILE, SCRATCH_SLOTS
};
void* scratch(ScratchSlot slot, size_t bytes);
