// Whose turn it is: choices ordered by expert, and a list of the experts that were chosen. One block.
//
// work: [0] experts chosen, [1] choices that are here; then for each such expert its number and the place of its first
// choice in `order`, and behind the last the place where it ends. Choices of an expert come in any order: each is a
// column of its own in the products, whatever the others are.
//
// blocks, where wanted: the same cut into blocks of at most `rows` choices of one expert, those of an expert of nearly
// one size. [0] how many; from [4] on for each its expert, its first place, how many, and nothing.
#include "device.cuh"

struct Parameters {
    const long long* ids;  // [choices], below 0: not here
    int* order;            // [choices]
    int* work;             // [2 + 2 * (experts + 1)]
    int* blocks;           // or null
    int choices, experts, rows;
};

constexpr int THREADS = 512, WARPS = THREADS / 32;  // an expert a thread
constexpr int AT_ONCE = 8;                          // choices that a thread asks for together

// The sum over the threads before this one, and over all.
__device__ inline int sum_before(int value, int (&sums)[WARPS], int& all) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, before = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int left = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += left;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    before -= value, all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += sums[w];
        all += sums[w];
    }
    return before;
}

extern "C" __global__ void __launch_bounds__(THREADS) experts_work(const __grid_constant__ Parameters p) {
    __shared__ int counts[THREADS], sums[3][WARPS];
    int thread = threadIdx.x;
    counts[thread] = 0;
    let_next_kernel_begin();
    wait_for_kernels_before();
    __syncthreads();
    auto for_choices = [&](auto work) {
        for (int first = thread; first < p.choices; first += AT_ONCE * THREADS) {
            long long ids[AT_ONCE];
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) ids[n] = first + n * THREADS < p.choices ? p.ids[first + n * THREADS] : -1;
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                if (ids[n] >= 0) work(first + n * THREADS, (int)ids[n]);
        }
    };
    for_choices([&](int, int expert) { atomicAdd(counts + expert, 1); });
    __syncthreads();
    int own = counts[thread], all_rows, all_used, all_parts;
    int place = sum_before(own, sums[0], all_rows), slot = sum_before(own > 0, sums[1], all_used);
    counts[thread] = place;  // of its next choice
    if (own) p.work[2 + 2 * slot] = thread, p.work[3 + 2 * slot] = place;
    if (thread == 0) p.work[0] = all_used, p.work[1] = all_rows, p.work[3 + 2 * all_used] = all_rows;
    if (p.blocks) {
        int parts = (own + p.rows - 1) / p.rows, part = sum_before(parts, sums[2], all_parts);
        int each = parts ? (own + parts - 1) / parts : 0;
        for (int n = 0; n < parts; n++) {
            int first = n * each, count = own - first < each ? own - first : each;
            *(Quad*)(p.blocks + 4 + 4 * (part + n)) = Quad{(u32)thread, (u32)(place + first), (u32)count, 0};
        }
        if (thread == 0) p.blocks[0] = all_parts;
    }
    __syncthreads();
    for_choices([&](int choice, int expert) { p.order[atomicAdd(counts + expert, 1)] = choice; });
}
