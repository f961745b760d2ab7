// What lies between the products, a launch each: norms, sums, rotary embedding, what the cache holds.
// And what a step begins and ends with. Rounded where kernels/reference rounds.
#include "device.cuh"

// ---- sums over a block

__device__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    __syncthreads();  // the sum before may still be read
    if (!(threadIdx.x & 31)) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    x = (int)threadIdx.x < (int)blockDim.x / 32 ? parts[threadIdx.x] : 0.0f;
    if (threadIdx.x < 32) x = warp_sum(x);
    if (threadIdx.x == 0) parts[0] = x;
    __syncthreads();
    return parts[0];
}

__device__ inline u32 word(const Quad& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

__device__ inline float value(const Quad& q, int i) { return from_bf16((u16)(word(q, i / 2) >> (i % 2 * 16))); }

// ---- RMSNorm, and latents: rows of [n] normed, then [rope] rotated

struct NormParameters {
    const u16* x;       // [rows][stride]
    const u16* weight;  // [n]
    const float* cos;   // [rows][rope / 2]; unused without rope
    const float* sin;
    u16* y;             // [rows][n + rope]
    u8* cache;          // [slots][n + rope], which gets the rows, too; or none
    const long long* slots;  // [rows]
    int n, rope, stride;  // n a multiple of 8
    int fp8;              // the cache is E4M3, else BF16
    float eps;
};

// A thread keeps its first 8 values; rows of more than 8192 are read again.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(const __grid_constant__ NormParameters p) {
    int first = threadIdx.x * 8, stride = blockDim.x * 8;
    Quad w = {0, 0, 0, 0}, kept = {0, 0, 0, 0};
    if (first < p.n) w = load_quad(p.weight + first);
    wait_for_kernels_before();
    const u16* x = p.x + (u64)blockIdx.x * p.stride;
    u16* y = p.y + (u64)blockIdx.x * (p.n + p.rope);
    u8* entry = p.cache ? p.cache + (u64)p.slots[blockIdx.x] * (p.n + p.rope) * (p.fp8 ? 1 : 2) : nullptr;
    float sum = 0.0f;
    for (int at = first; at < p.n; at += stride) {
        Quad q = load_quad(x + at);
        if (at == first) kept = q;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += value(q, i) * value(q, i);
    }
    float factor = rsqrtf(block_sum(sum) / p.n + p.eps);
    let_next_kernel_begin();  // not before: behind the weights that it asks for, what is read here would come late
    for (int at = first; at < p.n; at += stride) {
        Quad q = kept;
        if (at != first) q = load_quad(x + at), w = load_quad(p.weight + at);
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[i] = pack_bf16(round_bf16(value(q, 2 * i) * factor) * value(w, 2 * i),
                               round_bf16(value(q, 2 * i + 1) * factor) * value(w, 2 * i + 1));
        *(Quad*)(y + at) = Quad{out[0], out[1], out[2], out[3]};
        if (!entry) continue;
        if (p.fp8)
            *(uint2*)(entry + at) = uint2{(u32)to_fp8(out[1]) << 16 | to_fp8(out[0]), (u32)to_fp8(out[3]) << 16 | to_fp8(out[2])};
        else
            *(Quad*)(entry + 2 * at) = Quad{out[0], out[1], out[2], out[3]};
    }
    for (int i = threadIdx.x; i < p.rope / 2; i += blockDim.x) {
        float even = from_bf16(x[p.n + 2 * i]), odd = from_bf16(x[p.n + 2 * i + 1]);
        float c = p.cos[(u64)blockIdx.x * (p.rope / 2) + i], s = p.sin[(u64)blockIdx.x * (p.rope / 2) + i];
        u32 pair = pack_bf16(even * c - odd * s, even * s + odd * c);
        *(u32*)(y + p.n + 2 * i) = pair;
        if (entry && p.fp8) *(u16*)(entry + p.n + 2 * i) = to_fp8(pair);
        else if (entry) *(u32*)(entry + 2 * (p.n + 2 * i)) = pair;
    }
}

// ---- sums

struct AddParameters {
    const u16* x;  // [count], as y and the total; a multiple of 8
    const u16* y;
    u16* total;
    long long count;
};

extern "C" __global__ void __launch_bounds__(256) add_rows(const __grid_constant__ AddParameters p) {
    long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * 8;
    let_next_kernel_begin();
    wait_for_kernels_before();
    if (at >= p.count) return;
    float sums[8] = {};
    add(sums, load_quad(p.x + at));
    add(sums, load_quad(p.y + at));
    *(Quad*)(p.total + at) = rounded(sums);
}

// ---- rotary embedding

struct RotaryParameters {
    const u16* x;  // [tokens][heads][d], strides in values
    const float* cos;
    const float* sin;
    u16* y;  // [tokens][heads][d]
    int tokens, heads, d, token_stride, head_stride;
};

extern "C" __global__ void __launch_bounds__(256) rotary(const __grid_constant__ RotaryParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    int pairs = p.d / 2, i = (int)blockIdx.x * 256 + (int)threadIdx.x;
    if (i >= p.tokens * p.heads * pairs) return;
    int pair = i % pairs, head = i / pairs % p.heads, token = i / pairs / p.heads;
    const u16* x = p.x + (u64)token * p.token_stride + (u64)head * p.head_stride + 2 * pair;
    float even = from_bf16(x[0]), odd = from_bf16(x[1]);
    float c = p.cos[token * pairs + pair], s = p.sin[token * pairs + pair];
    *(u32*)(p.y + 2 * (u64)i) = pack_bf16(even * c - odd * s, even * s + odd * c);
}

// ---- what the cache holds

struct StoreParameters {
    const u16* entries;      // [tokens][width], width even
    const long long* slots;  // [tokens]
    u8* cache;               // [slots][width]
    int width, fp8;
};

extern "C" __global__ void __launch_bounds__(128) store(const __grid_constant__ StoreParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    u64 slot = (u64)p.slots[blockIdx.x];
    const u32* from = (const u32*)(p.entries + (u64)blockIdx.x * p.width);
    for (int i = threadIdx.x; i < p.width / 2; i += 128) {
        u32 pair = from[i];
        if (p.fp8) ((u16*)(p.cache + slot * p.width))[i] = to_fp8(pair);
        else ((u32*)(p.cache + slot * p.width * 2))[i] = pair;
    }
}

// ---- a step's inputs

struct StepParameters {
    const long long* slots;   // [requests]
    const long long* starts;  // of every slot, as tokens and tables
    const long long* tokens;  // [slots][token_stride]
    const long long* tables;  // [slots][table_stride]
    long long* ids;           // [requests][width]
    long long* positions;     // [requests][width]
    long long* mapping;       // [requests][width]
    long long* own;           // [requests][blocks]
    long long* contexts;      // [requests]
    int width, blocks, block_size, token_stride, table_stride;
};

// A block a request.
extern "C" __global__ void __launch_bounds__(128) step_inputs(const __grid_constant__ StepParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    long long request = blockIdx.x, slot = p.slots[request], first = p.starts[slot];
    const long long* table = p.tables + slot * p.table_stride;
    for (int i = threadIdx.x; i < p.blocks; i += 128) p.own[request * p.blocks + i] = table[i];
    for (int i = threadIdx.x; i < p.width; i += 128) {
        long long at = request * p.width + i, position = first + i, column = position / p.block_size;
        p.ids[at] = p.tokens[slot * p.token_stride + i];
        p.positions[at] = position;
        p.mapping[at] = table[column] * p.block_size + position % p.block_size;
    }
    if (threadIdx.x == 0) p.contexts[request] = first + p.width;
}

struct AnglesParameters {
    const long long* positions;  // [tokens]
    const float* frequencies;    // [pairs]
    float* cos;                  // [tokens][pairs]
    float* sin;
    int tokens, pairs;
    float magnitude;
};

extern "C" __global__ void __launch_bounds__(128) cos_sin(const __grid_constant__ AnglesParameters p) {
    int i = (int)blockIdx.x * 128 + (int)threadIdx.x;
    let_next_kernel_begin();
    wait_for_kernels_before();
    if (i >= p.tokens * p.pairs) return;
    float angle = (float)p.positions[i / p.pairs] * p.frequencies[i % p.pairs];
    p.cos[i] = cosf(angle) * p.magnitude;
    p.sin[i] = sinf(angle) * p.magnitude;
}

// ---- the greatest of a row

struct ArgmaxParameters {
    const u8* logits;  // [rows][width], BF16 or FP32, rows 16 bytes aligned
    long long* ids;    // [rows]
    int width, fp32;
};

// Greater values have greater keys, and of equal ones the first: NaN before all, zeros alike.
__device__ inline u64 key(float value, int place) {
    u32 bits = __float_as_uint(value + 0.0f);
    bits = value != value ? ~0u : bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return (u64)bits << 32 | (u32)~place;
}

__device__ inline u64 greatest_of_warp(u64 best) {
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        u64 other = __shfl_xor_sync(~0u, best, step);
        if (other > best) best = other;
    }
    return best;
}

// A cluster has a row.
extern "C" __global__ void __launch_bounds__(256) argmax(const __grid_constant__ ArgmaxParameters p) {
    __shared__ u64 parts[8], own;
    int cluster = (int)cluster_size(), row = (int)blockIdx.x / cluster, quads = p.width / (p.fp32 ? 4 : 8);
    const u8* logits = p.logits + (u64)row * p.width * (p.fp32 ? 4 : 2);
    let_next_kernel_begin();
    wait_for_kernels_before();
    u64 best = 0;
    for (int i = (int)(cluster_rank() * 256 + threadIdx.x); i < quads; i += cluster * 256) {
        Quad q = load_quad(logits + (u64)i * 16);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            if (p.fp32 && n >= 4) break;
            u64 other = p.fp32 ? key(__uint_as_float(word(q, n & 3)), i * 4 + n) : key(value(q, n), i * 8 + n);
            if (other > best) best = other;
        }
    }
    best = greatest_of_warp(best);
    if (!(threadIdx.x & 31)) parts[threadIdx.x >> 5] = best;
    __syncthreads();
    if (threadIdx.x < 32) {
        best = greatest_of_warp(threadIdx.x < 8 ? parts[threadIdx.x] : 0);
        if (threadIdx.x == 0) own = best;
    }
    cluster_barrier();
    if (cluster_rank() == 0 && threadIdx.x < 32) {
        best = greatest_of_warp((int)threadIdx.x < cluster ? cluster_u64(shared_address(&own), threadIdx.x) : 0);
        if (threadIdx.x == 0) p.ids[row] = (long long)~(u32)best;
    }
    cluster_barrier();  // until here others' memory is read
}
