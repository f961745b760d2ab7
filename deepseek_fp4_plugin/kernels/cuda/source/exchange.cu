// What ranks on the GPUs of one machine send one another, written straight into the others' memory.
//
// A rank's mailbox has a place for every source, block and thread. A packet is 8 bytes of data and, after each 4, the
// number of the exchange: who reads it knows from the packet alone that it has come, and no barrier is needed. Two
// halves of a mailbox take turns: a rank that sends its exchange e + 2 has got all of e + 1, so its peers have begun
// e + 1 and have read all of e. Every block counts its own exchanges, so a launch may have any number of blocks,
// the same on all ranks; the first thread of a block always sends and waits.
#include "device.cuh"

#define RANKS 8     // at most
#define THREADS 256  // a block's places in a mailbox; a launch may use fewer

struct Mailboxes {
    u64 box[RANKS];  // by rank: [2][ranks][capacity] packets
    u32* counts;     // [blocks], this rank's own
    int ranks, rank, capacity;
};

__device__ inline Quad* place(const Mailboxes& m, int owner, int source, u32 count) {
    u64 at = (u64)((int)(count & 1) * m.ranks + source) * m.capacity + blockIdx.x * THREADS + threadIdx.x;
    return (Quad*)m.box[owner] + at * 2;
}

__device__ inline void send(Quad* place, const Quad& q, u32 count) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%2};" ::"l"(place), "r"(q.x), "r"(count), "r"(q.y) : "memory");
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%2};" ::"l"(place + 1), "r"(q.z), "r"(count), "r"(q.w)
                 : "memory");
}

__device__ inline Quad receive(const Quad* place, u32 count) {
    Quad q;
    u32 first, second, third, fourth;
    do {
        asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(q.x), "=r"(first), "=r"(q.y), "=r"(second)
                     : "l"(place)
                     : "memory");
        asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(q.z), "=r"(third), "=r"(q.w), "=r"(fourth)
                     : "l"(place + 1)
                     : "memory");
    } while (first != count || second != count || third != count || fourth != count);
    return q;
}

// ---- gather, reduce-scatter and all-reduce of small tensors, one hop each

struct ExchangeParameters {
    Mailboxes mail;
    const Quad* x;
    Quad* y;
    int first[RANKS], count[RANKS];  // 16-byte pieces of x that go to each rank
    int to[RANKS], size[RANKS];      // of what each rank sends here: its pieces, and where in y they begin
    int sum;                         // the parts are BF16 and are added, in FP32 in the order of the ranks
};

extern "C" __global__ void __launch_bounds__(THREADS) exchange(const __grid_constant__ ExchangeParameters p) {
    const Mailboxes& m = p.mail;
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    let_next_kernel_begin();
    wait_for_kernels_before();
    u32 count = m.counts[blockIdx.x] + 1;
    Quad own = {0, 0, 0, 0};
    for (int step = 0; step < m.ranks; step++) {
        int peer = (m.rank + step) % m.ranks;
        Quad q = {0, 0, 0, 0};
        if (i < p.count[peer]) q = load_quad(p.x + p.first[peer] + i);
        if (step == 0) own = q;
        else if (i < p.count[peer] || threadIdx.x == 0) send(place(m, peer, m.rank, count), q, count);
    }
    float sums[8] = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};
    for (int peer = 0; peer < m.ranks; peer++) {
        Quad q = own;
        bool wanted = i < p.size[peer];
        if (peer != m.rank && (wanted || threadIdx.x == 0)) q = receive(place(m, m.rank, peer, count), count);
        if (!wanted) continue;
        if (p.sum) add(sums, q);
        else p.y[p.to[peer] + i] = q;
    }
    if (p.sum && i < p.size[m.rank]) p.y[i] = rounded(sums);
    __syncthreads();  // all have read the count
    if (threadIdx.x == 0) m.counts[blockIdx.x] = count;
}

// ---- the sum of all ranks' rows, the residual, and the norm behind it

struct SumNormParameters {
    Mailboxes mail;
    const Quad* x;       // [rows][pieces], this rank's part
    const Quad* other;   // added to it before, or none
    const Quad* hidden;  // the residual
    const Quad* weight;  // [pieces]
    Quad* y;             // hidden + the sum
    Quad* normed;
    int pieces;  // of 8 values, in a row
    float eps;
};

// A cluster has a row, a thread 8 values of it. Rounded where a sum, an addition and a norm by themselves are.
extern "C" __global__ void __launch_bounds__(THREADS) sum_norm(const __grid_constant__ SumNormParameters p) {
    __shared__ float parts[THREADS / 32], totals[8];  // of warps, and of the cluster's blocks
    const Mailboxes& m = p.mail;
    int size = (int)cluster_size(), row = (int)blockIdx.x / size, i = (int)(cluster_rank() * blockDim.x + threadIdx.x);
    bool wanted = i < p.pieces;
    Quad w = {0, 0, 0, 0};
    if (wanted) w = load_weights(p.weight + i);
    cluster_arrive();
    wait_for_kernels_before();
    // Not before: whatever a step began with is there for all that begins behind a norm.
    if (m.ranks == 1) let_next_kernel_begin();
    u32 count = m.ranks > 1 ? m.counts[blockIdx.x] + 1 : 0;
    Quad own = {0, 0, 0, 0}, old = {0, 0, 0, 0}, more = {0, 0, 0, 0};
    u64 at = (u64)row * p.pieces + i;
    if (wanted) own = load_quad(p.x + at), old = load_quad(p.hidden + at);
    if (wanted && p.other) more = load_quad(p.other + at);
    if (p.other) {
        float both[8] = {};
        add(both, own), add(both, more);
        own = rounded(both);
    }
    for (int step = 1; step < m.ranks; step++) {
        int peer = (m.rank + step) % m.ranks;
        if (wanted || threadIdx.x == 0) send(place(m, peer, m.rank, count), own, count);
    }
    if (m.ranks > 1) let_next_kernel_begin();  // which asks for its weights while others' parts are under way
    float sums[8] = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};
    for (int peer = 0; peer < m.ranks; peer++) {
        Quad q = own;
        if (peer != m.rank && (wanted || threadIdx.x == 0)) q = receive(place(m, m.rank, peer, count), count);
        add(sums, q);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) sums[k] = round_bf16(sums[k]);
    add(sums, old);
    Quad y = rounded(sums);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        sums[k] = round_bf16(sums[k]);
        if (wanted) squares += sums[k] * sums[k];
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
    if (!(threadIdx.x & 31)) parts[threadIdx.x >> 5] = squares;
    __syncthreads();
    cluster_wait();  // the others have begun
    if ((int)threadIdx.x < size) {  // a block's sum goes to all of them, so that none is read from one that has ended
        float total = 0.0f;
        for (int k = 0; k < (int)blockDim.x / 32; k++) total += parts[k];
        cluster_store(shared_address(totals + cluster_rank()), threadIdx.x, total);
        if (m.ranks > 1 && threadIdx.x == 0) m.counts[blockIdx.x] = count;
    }
    cluster_barrier();
    float total = 0.0f;
    for (int k = 0; k < size; k++) total += totals[k];
    float factor = rsqrtf(total / (p.pieces * 8) + p.eps);
    if (wanted) {
        p.y[at] = y;
        const u32 weights[4] = {w.x, w.y, w.z, w.w};
        u32 out[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            out[k] = pack_bf16(round_bf16(sums[2 * k] * factor) * from_bf16((u16)weights[k]),
                               round_bf16(sums[2 * k + 1] * factor) * from_bf16((u16)(weights[k] >> 16)));
        p.normed[at] = Quad{out[0], out[1], out[2], out[3]};
    }
}
