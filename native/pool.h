// Threads and scratch memory shared by every kernel.
#pragma once
#include <cstddef>
#include <cstdint>

// Runs task(context, item) for every item in [0, items), on the caller and up to threads - 1 pool threads: each walks its
// own part of the items in order, then helps the others. Fewer than 2^32 items. Pool threads are started when first needed, spin for some tens of microseconds
// after a job and then sleep. When another thread of the process is inside a job already, the caller works alone.
void run_parallel(int threads, int64_t items, void (*task)(void* context, int64_t item), void* context);

// Thread-local memory, 64-byte aligned, that grows and is reused; what it held before is lost. One user a slot.
enum ScratchSlot {
  SCRATCH_INPUT, SCRATCH_HIDDEN, SCRATCH_ROUTING, SCRATCH_RESULT, SCRATCH_PANEL, SCRATCH_TILE, SCRATCH_SLOTS
};
void* scratch(ScratchSlot slot, size_t bytes);
