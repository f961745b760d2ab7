// Whose turn it is: choices ordered by expert, and a list of the experts that were chosen. One block.
//
// work: [0] experts chosen, [1] choices that are here; then for each such expert its number and the place of its first
// choice in `order`, and behind the last the place where it ends. Choices of an expert come in any order: each is a
// column of its own in the products, whatever the others are.
#include "device.cuh"

struct Parameters {
    const long long* ids;  // [choices], below 0: not here
    int* order;            // [choices]
    int* work;             // [2 + 2 * (experts + 1)]
    int choices, experts;
};

constexpr int THREADS = 512;  // an expert each

extern "C" __global__ void __launch_bounds__(THREADS) experts_work(const __grid_constant__ Parameters p) {
    __shared__ int counts[THREADS], rows[THREADS / 32], used[THREADS / 32];
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    counts[thread] = 0;
    let_next_kernel_begin();
    wait_for_kernels_before();
    __syncthreads();
    for (int i = thread; i < p.choices; i += THREADS)
        if (p.ids[i] >= 0) atomicAdd(counts + p.ids[i], 1);
    __syncthreads();
    int own = counts[thread], before = own, chosen = own > 0;
    u32 others = __ballot_sync(~0u, chosen);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int left = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += left;
    }
    if (lane == 31) rows[warp] = before, used[warp] = __popc(others);
    __syncthreads();
    int place = before - own, slot = __popc(others & ((1u << lane) - 1)), all_rows = 0, all_used = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) place += rows[w], slot += used[w];
        all_rows += rows[w], all_used += used[w];
    }
    counts[thread] = place;  // of its next choice
    if (chosen) p.work[2 + 2 * slot] = thread, p.work[3 + 2 * slot] = place;
    if (thread == 0) p.work[0] = all_used, p.work[1] = all_rows, p.work[3 + 2 * all_used] = all_rows;
    __syncthreads();
    for (int i = thread; i < p.choices; i += THREADS)
        if (p.ids[i] >= 0) p.order[atomicAdd(counts + p.ids[i], 1)] = i;
}
