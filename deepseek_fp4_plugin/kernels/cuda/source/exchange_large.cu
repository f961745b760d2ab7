// The all-reduce of large BF16 tensors over the GPUs of one machine, written straight into the others' memory.
//
// A block has every gridDim.x-th chunk of the tensor. Data go as they are, and a flag behind each chunk says that they
// have come. Between two ranks each sends the other all of it and adds for itself: as many bytes as in two hops, one hop
// less. Between more, a rank adds one slice of every chunk and sends the sum back. While one chunk is on its way the one
// before is added. Halves of the boxes take turns, as in exchange.cu.
#include "device.cuh"

#define RANKS 8
#define THREADS 512

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

// What the block has written is there before its flags are.
__device__ inline void raise(const LargeParameters& p, int kind, int chunk, u32 count) {
    __syncthreads();
    if ((int)threadIdx.x < p.ranks && (int)threadIdx.x != p.rank) {
        u32* flag = (u32*)p.flags[threadIdx.x] + (u64)(kind * p.ranks + p.rank) * p.chunks + chunk;
        asm volatile("fence.acq_rel.sys;\nst.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
    }
}

__device__ inline void await(const LargeParameters& p, int kind, int chunk, u32 count) {
    if ((int)threadIdx.x < p.ranks && (int)threadIdx.x != p.rank) {
        u32 seen;
        const u32* flag = (const u32*)p.flags[p.rank] + (u64)(kind * p.ranks + (int)threadIdx.x) * p.chunks + chunk;
        do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        while (seen != count);
    }
    __syncthreads();
}

__device__ inline void add(float (&sums)[8], const Quad& q) {
    const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[2 * i] += from_bf16((u16)words[i]);
        sums[2 * i + 1] += from_bf16((u16)(words[i] >> 16));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) all_reduce(const __grid_constant__ LargeParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    u32 count = p.counts[blockIdx.x] + 1;
    u64 half = count & 1;
    bool two = p.ranks == 2;
    int width = two ? p.chunk : p.chunk / p.ranks;  // what one rank adds of a chunk
    int mine = two ? 0 : p.rank * width;
    int number = (p.pieces + p.chunk - 1) / p.chunk;
    int own = ((int)blockIdx.x < number) ? (number - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
    for (int step = 0; step < own + (two ? 1 : 2); step++) {
        if (step < own) {
            int chunk = (int)blockIdx.x + step * (int)gridDim.x;
            for (int k = 1; k < p.ranks; k++) {
                int peer = (p.rank + k) % p.ranks;
                int from = chunk * p.chunk + (two ? 0 : peer * width), end = min(from + width, p.pieces);
                Quad* box = (Quad*)p.inbox[peer] + (half * p.ranks + p.rank) * p.slot + (u64)chunk * width;
#pragma unroll 4
                for (int i = from + (int)threadIdx.x; i < end; i += THREADS) box[i - from] = load_quad(p.x + i);
            }
            raise(p, 0, chunk, count);
        }
        if (step >= 1 && step <= own) {
            int chunk = (int)blockIdx.x + (step - 1) * (int)gridDim.x;
            int from = chunk * p.chunk + mine, end = min(from + width, p.pieces);
            await(p, 0, chunk, count);
            const Quad* box = (const Quad*)p.inbox[p.rank] + half * p.ranks * p.slot + (u64)chunk * width;
#pragma unroll 2
            for (int i = from + (int)threadIdx.x; i < end; i += THREADS) {
                float sums[8] = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};
                for (int rank = 0; rank < p.ranks; rank++)
                    add(sums, rank == p.rank ? load_quad(p.x + i) : load_sent(box + (u64)rank * p.slot + (i - from)));
                Quad y = {pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]), pack_bf16(sums[4], sums[5]),
                          pack_bf16(sums[6], sums[7])};
                p.y[i] = y;
                if (!two)
                    for (int k = 1; k < p.ranks; k++)
                        ((Quad*)p.sums[(p.rank + k) % p.ranks])[half * p.capacity + i] = y;
            }
            if (!two) raise(p, 1, chunk, count);
        }
        if (!two && step >= 2) {
            int chunk = (int)blockIdx.x + (step - 2) * (int)gridDim.x;
            int from = chunk * p.chunk, end = min(from + p.chunk, p.pieces);
            await(p, 1, chunk, count);
            const Quad* box = (const Quad*)p.sums[p.rank] + half * p.capacity;
#pragma unroll 4
            for (int i = from + (int)threadIdx.x; i < end; i += THREADS)
                if (i - from < mine || i - from >= mine + width) p.y[i] = load_sent(box + i);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}
