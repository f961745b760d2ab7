// The two products around absorbed attention, for few tokens: each head by its own rows of kv_b_proj, BF16.
//
// Weights are asked for before the kernels ahead have ended, and what comes behind can ask for its own.
#include "device.cuh"

__device__ inline u32 word(const Quad& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }
__device__ inline float value(const Quad& q, int i) { return from_bf16((u16)(word(q, i / 2) >> (i % 2 * 16))); }

struct AbsorbParameters {
    const u16* q;       // [tokens][q_token] with heads q_head apart, [nope] each
    const u16* weight;  // [heads][rows][latent], of which the first `nope` rows
    u16* y;             // [tokens][heads][latent]
    const u16* rope;    // [tokens][rope_token] with heads rope_head apart: pairs to turn, where there are blocks for them
    const float* cos;   // [tokens][pairs]
    const float* sin;
    u16* turned;        // [tokens][heads][2 * pairs]
    int tokens, q_token, q_head, heads, rows, nope, latent;  // nope at most 256, latent a multiple of 64
    int rope_token, rope_head, pairs;
    const u16* kv;           // [tokens][kv_stride], latents and their rotary parts, where there are blocks for them
    const u16* norm;         // [latent]
    const long long* slots;  // [tokens]
    u8* cache;               // [slots][latent + 2 * pairs]
    int kv_stride, fp8;      // the cache is E4M3, else BF16
    float eps;
};

// The part of a query that is not absorbed: rotated as `rotary` does.
__device__ inline void turn(const AbsorbParameters& p, int head) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int i = (int)threadIdx.x; i < p.tokens * p.pairs; i += 256) {
        int token = i / p.pairs, pair = i % p.pairs;
        u32 values = *(const u32*)(p.rope + (u64)token * p.rope_token + (u64)head * p.rope_head + 2 * pair);
        float even = from_bf16((u16)values), odd = from_bf16((u16)(values >> 16)), c = p.cos[i], s = p.sin[i];
        *(u32*)(p.turned + (((u64)token * p.heads + head) * p.pairs + pair) * 2) =
            pack_bf16(even * c - odd * s, even * s + odd * c);
    }
}

// Two BF16 values as the cache holds them.
__device__ inline void store_pair(const AbsorbParameters& p, u64 at, u32 pair) {
    if (p.fp8) *(u16*)(p.cache + at) = to_fp8(pair);
    else *(u32*)(p.cache + 2 * at) = pair;
}

// Tokens' latents, normed and rotated, at their slots; rounded as `rms_norm` rounds. A thread has two values.
__device__ inline void store_latents(const AbsorbParameters& p, int first) {
    __shared__ float sums[8];
    int at = 2 * (int)threadIdx.x;
    u32 weight = at < p.latent ? *(const u32*)(p.norm + at) : 0;
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int token = first; token < p.tokens; token += p.heads) {
        const u16* kv = p.kv + (u64)token * p.kv_stride;
        u64 slot = (u64)p.slots[token] * (p.latent + 2 * p.pairs);
        u32 values = at < p.latent ? *(const u32*)(kv + at) : 0;
        float low = from_bf16((u16)values), high = from_bf16((u16)(values >> 16)), sum = low * low + high * high;
#pragma unroll
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        __syncthreads();  // the sums of the token before have been read
        if (!(threadIdx.x & 31)) sums[threadIdx.x >> 5] = sum;
        __syncthreads();
        sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; w++) sum += sums[w];
        float factor = rsqrtf(sum / p.latent + p.eps);
        if (at < p.latent)
            store_pair(p, slot + at, pack_bf16(round_bf16(low * factor) * from_bf16((u16)weight),
                                               round_bf16(high * factor) * from_bf16((u16)(weight >> 16))));
        for (int pair = (int)threadIdx.x; pair < p.pairs; pair += 256) {
            float even = from_bf16(kv[p.latent + 2 * pair]), odd = from_bf16(kv[p.latent + 2 * pair + 1]);
            float c = p.cos[token * p.pairs + pair], s = p.sin[token * p.pairs + pair];
            store_pair(p, slot + p.latent + 2 * pair, pack_bf16(even * c - odd * s, even * s + odd * c));
        }
    }
}

// y[h] = W_h^T q[h]. A block has 64 outputs of a head, a thread 8 of them and every 32nd row; then come a head's blocks
// for its rotary parts, and for latents.
extern "C" __global__ void __launch_bounds__(256) absorb(const __grid_constant__ AbsorbParameters p) {
    constexpr int HELD = 8, WARPS = 8;
    __shared__ float sums[WARPS][64];
    int octet = threadIdx.x & 7, group = threadIdx.x >> 3, warp = threadIdx.x >> 5;
    int head = (int)blockIdx.y, column = (int)blockIdx.x * 64;
    if (column == p.latent) {
        turn(p, head);
        return;
    }
    if (column > p.latent) {
        store_latents(p, head);
        return;
    }
    const u16* weight = p.weight + ((u64)head * p.rows + group) * p.latent + column + octet * 8;
    Quad held[HELD] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (group + 32 * i < p.nope) held[i] = load_weights(weight + (u64)32 * i * p.latent);
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int token = 0; token < p.tokens; token++) {
        const u16* q = p.q + (u64)token * p.q_token + (u64)head * p.q_head + group;
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            float factor = group + 32 * i < p.nope ? from_bf16(q[32 * i]) : 0.0f;
#pragma unroll
            for (int n = 0; n < 8; n++) sum[n] += factor * value(held[i], n);
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            sum[n] += __shfl_xor_sync(~0u, sum[n], 8);
            sum[n] += __shfl_xor_sync(~0u, sum[n], 16);
        }
        __syncthreads();  // the sums of the token before have been read
        if ((threadIdx.x & 31) < 8)
#pragma unroll
            for (int n = 0; n < 8; n++) sums[warp][octet * 8 + n] = sum[n];
        __syncthreads();
        if (threadIdx.x < 64) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
            p.y[((u64)token * p.heads + head) * p.latent + column + threadIdx.x] = to_bf16(total);
        }
    }
}

struct ValuesParameters {
    const u16* x;       // [tokens][heads][latent]
    const u16* weight;  // [heads][rows][latent], of which the last `outputs` rows
    u16* y;             // [tokens][heads][outputs]
    int tokens, heads, rows, outputs, latent;  // latent a multiple of 8, at most 512
};

// y[h] = W_h x[h]. A warp has two outputs of a head.
extern "C" __global__ void __launch_bounds__(256) values(const __grid_constant__ ValuesParameters p) {
    constexpr int OUTPUTS = 2, QUADS = 2;
    int lane = threadIdx.x & 31, head = (int)blockIdx.y;
    int first = ((int)blockIdx.x * 8 + (int)(threadIdx.x >> 5)) * OUTPUTS;
    const u16* weight = p.weight + ((u64)head * p.rows + p.rows - p.outputs + first) * p.latent + lane * 8;
    Quad held[OUTPUTS][QUADS] = {};
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            if (first + o < p.outputs && lane * 8 + 256 * i < p.latent)
                held[o][i] = load_weights(weight + (u64)o * p.latent + 256 * i);
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int token = 0; token < p.tokens; token++) {
        const u16* x = p.x + ((u64)token * p.heads + head) * p.latent + lane * 8;
        float sum[OUTPUTS] = {};
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            if (lane * 8 + 256 * i >= p.latent) continue;
            Quad q = load_quad(x + 256 * i);
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
                for (int n = 0; n < 8; n++) sum[o] += value(held[o][i], n) * value(q, n);
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
#pragma unroll
            for (int step = 16; step; step >>= 1) sum[o] += __shfl_xor_sync(~0u, sum[o], step);
            if (lane == 0 && first + o < p.outputs)
                p.y[((u64)token * p.heads + head) * p.outputs + first + o] = to_bf16(sum[o]);
        }
    }
}

struct MergedParameters {
    const float* parts;  // [splits][tokens * heads][latent], of a context's attention
    const float* sums;   // [splits][tokens * heads], base-2 logarithm of each part's sum of exponentials
    const u16* weight;   // [heads][rows][latent], of which the last `outputs` rows
    u16* y;              // [tokens][heads][outputs]
    int splits, heads, rows, outputs, latent;  // splits at most 32, latent at most 512
};

// The same of attention over the parts of a context, merged and rounded as `mla_merge` does. A block has 16 outputs of a
// head of a token.
extern "C" __global__ void __launch_bounds__(256) merged_values(const __grid_constant__ MergedParameters p) {
    constexpr int OUTPUTS = 2, QUADS = 2, AT_ONCE = 16, MERGERS = 4;
    __shared__ __align__(16) u32 merged[256];
    int lane = threadIdx.x & 31, head = (int)blockIdx.y, token = (int)blockIdx.z;
    int first = ((int)blockIdx.x * 8 + (int)(threadIdx.x >> 5)) * OUTPUTS, column = 2 * (int)threadIdx.x;
    const u16* weight = p.weight + ((u64)head * p.rows + p.rows - p.outputs + first) * p.latent + lane * 8;
    Quad held[OUTPUTS][QUADS] = {};
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            if (first + o < p.outputs && lane * 8 + 256 * i < p.latent)
                held[o][i] = load_weights(weight + (u64)o * p.latent + 256 * i);
    let_next_kernel_begin();
    wait_for_kernels_before();
    int row = token * p.heads + head, all = (int)gridDim.z * p.heads;
    float share = lane < p.splits ? p.sums[lane * all + row] : NOTHING, most = share;
    float sums[MERGERS][2] = {};
    const float* part = p.parts + (u64)row * p.latent + column;
    for (int begin = 0; begin < p.splits; begin += AT_ONCE) {
        uint2 values[AT_ONCE] = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (begin + i < p.splits && column < p.latent) values[i] = *(const uint2*)(part + (u64)(begin + i) * all * p.latent);
        if (begin == 0) {
#pragma unroll
            for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            share = exp2_fast(share - most);
            float total = share;
#pragma unroll
            for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
            share /= total;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float factor = __shfl_sync(~0u, share, (begin + i) & 31);
            if (begin + i >= p.splits || !(factor > 0.0f)) continue;  // an empty part was not written
            sums[i % MERGERS][0] += factor * __uint_as_float(values[i].x);
            sums[i % MERGERS][1] += factor * __uint_as_float(values[i].y);
        }
    }
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int m = 0; m < MERGERS; m++) low += sums[m][0], high += sums[m][1];
    merged[threadIdx.x] = pack_bf16(low, high);
    __syncthreads();
    float sum[OUTPUTS] = {};
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        if (lane * 8 + 256 * i >= p.latent) continue;
        Quad q = shared_quad(shared_address(merged) + lane * 16 + 512 * i);
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
            for (int n = 0; n < 8; n++) sum[o] += value(held[o][i], n) * value(q, n);
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
#pragma unroll
        for (int step = 16; step; step >>= 1) sum[o] += __shfl_xor_sync(~0u, sum[o], step);
        if (lane == 0 && first + o < p.outputs) p.y[(u64)row * p.outputs + first + o] = to_bf16(sum[o]);
    }
}
