// The all-reduce of large BF16 tensors over the GPUs of one machine, written straight into the others' memory.
//
// A block has every gridDim.x-th chunk of the tensor. Data go as they are, and a flag behind each chunk says that they
// have come. Between two ranks each sends the other all of it and adds for itself: as many bytes as in two hops, one hop
// less. Between more, a rank adds one slice of every chunk and sends the sum back. Halves of the boxes take turns, as in
// exchange.cu. Compiled with -DTHREADS.
#include "device.cuh"

#define RANKS 8
#define HALF (THREADS / 2)

struct LargeParameters {
    u64 inbox[RANKS];  // by rank: [2][ranks][slot] pieces of 16 bytes
    u64 sums[RANKS];   // by rank: [2][capacity] pieces; unused between two ranks
    u64 flags[RANKS];  // by rank: [2][ranks][chunks] u32: parts, and sums
    const Quad* x;
    Quad* y;
    u32* counts;  // [blocks]
    int ranks, rank, pieces, chunk, slot, capacity, chunks;
};

__device__ inline Quad load_sent(const Quad* pointer) {
    Quad q;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(pointer)
                 : "memory");
    return q;
}

// Half of a block's threads send, the other half adds; each half meets at a barrier of its own.
__device__ inline void meet(int half) { asm volatile("bar.sync %0, %1;" ::"r"(half + 1), "n"(HALF) : "memory"); }

// What a half of the block has written is there before its flags are.
__device__ inline void raise(const LargeParameters& p, int half, int thread, int kind, int chunk, u32 count) {
    meet(half);
    if (thread < p.ranks && thread != p.rank) {
        u32* flag = (u32*)p.flags[thread] + (u64)(kind * p.ranks + p.rank) * p.chunks + chunk;
        asm volatile("fence.acq_rel.sys;\nst.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
    }
}

__device__ inline void await(const LargeParameters& p, int half, int thread, int kind, int chunk, u32 count) {
    if (thread < p.ranks && thread != p.rank) {
        u32 seen;
        const u32* flag = (const u32*)p.flags[p.rank] + (u64)(kind * p.ranks + thread) * p.chunks + chunk;
        do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        while (seen != count);
    }
    meet(half);
}

// The slices of a chunk that the others have added.
__device__ inline void take_sums(const LargeParameters& p, int thread, int chunk, int width, u64 turn, u32 count) {
    int from = chunk * p.chunk, end = min(from + p.chunk, p.pieces), mine = p.rank * width;
    await(p, 1, thread, 1, chunk, count);
    const Quad* box = (const Quad*)p.sums[p.rank] + turn * p.capacity;
#pragma unroll 2
    for (int i = from + thread; i < end; i += HALF)
        if (i - from < mine || i - from >= mine + width) p.y[i] = load_sent(box + i);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) all_reduce(const __grid_constant__ LargeParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    u32 count = p.counts[blockIdx.x] + 1;
    u64 turn = count & 1;
    bool two = p.ranks == 2;
    int width = two ? p.chunk : p.chunk / p.ranks;  // what one rank adds of a chunk
    int mine = two ? 0 : p.rank * width;
    int number = (p.pieces + p.chunk - 1) / p.chunk;
    int half = (int)threadIdx.x / HALF, thread = (int)threadIdx.x % HALF;
    if (half == 0) {
        for (int chunk = (int)blockIdx.x; chunk < number; chunk += (int)gridDim.x) {
            for (int k = 1; k < p.ranks; k++) {
                int peer = (p.rank + k) % p.ranks;
                int from = chunk * p.chunk + (two ? 0 : peer * width), end = min(from + width, p.pieces);
                Quad* box = (Quad*)p.inbox[peer] + (turn * p.ranks + p.rank) * p.slot + (u64)chunk * width;
#pragma unroll 2
                for (int i = from + thread; i < end; i += HALF) box[i - from] = load_quad(p.x + i);
            }
            raise(p, half, thread, 0, chunk, count);
        }
    } else {
        int before = -1;  // the chunk whose other slices are on their way
        for (int chunk = (int)blockIdx.x; chunk < number; chunk += (int)gridDim.x) {
            int from = chunk * p.chunk + mine, end = min(from + width, p.pieces);
            await(p, half, thread, 0, chunk, count);
            const Quad* box = (const Quad*)p.inbox[p.rank] + turn * p.ranks * p.slot + (u64)chunk * width;
#pragma unroll 2
            for (int i = from + thread; i < end; i += HALF) {
                float sums[8] = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};
                for (int rank = 0; rank < p.ranks; rank++)
                    add(sums, rank == p.rank ? load_quad(p.x + i) : load_sent(box + (u64)rank * p.slot + (i - from)));
                Quad y = rounded(sums);
                p.y[i] = y;
                if (!two)
                    for (int k = 1; k < p.ranks; k++)
                        ((Quad*)p.sums[(p.rank + k) % p.ranks])[turn * p.capacity + i] = y;
            }
            if (two) continue;
            raise(p, half, thread, 1, chunk, count);
            if (before >= 0) take_sums(p, thread, before, width, turn, count);
            before = chunk;
        }
        if (before >= 0) take_sums(p, thread, before, width, turn, count);
    }
    __syncthreads();
    if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}
