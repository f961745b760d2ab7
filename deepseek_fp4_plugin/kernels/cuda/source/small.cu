// What lies between the products, a launch each: norms, rotary embedding, what the cache holds, the router.
// Rounded where kernels/reference rounds.
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
    int n, rope, stride;  // n a multiple of 8
    float eps;
};

extern "C" __global__ void __launch_bounds__(256) rms_norm(const __grid_constant__ NormParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    const u16* x = p.x + (u64)blockIdx.x * p.stride;
    u16* y = p.y + (u64)blockIdx.x * (p.n + p.rope);
    float sum = 0.0f;
    for (int at = threadIdx.x * 8; at < p.n; at += 256 * 8) {
        Quad q = load_quad(x + at);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += value(q, i) * value(q, i);
    }
    float factor = rsqrtf(block_sum(sum) / p.n + p.eps);
    for (int at = threadIdx.x * 8; at < p.n; at += 256 * 8) {
        Quad q = load_quad(x + at), w = load_quad(p.weight + at);
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[i] = pack_bf16(round_bf16(value(q, 2 * i) * factor) * value(w, 2 * i),
                               round_bf16(value(q, 2 * i + 1) * factor) * value(w, 2 * i + 1));
        *(Quad*)(y + at) = Quad{out[0], out[1], out[2], out[3]};
    }
    for (int i = threadIdx.x; i < p.rope / 2; i += 256) {
        float even = from_bf16(x[p.n + 2 * i]), odd = from_bf16(x[p.n + 2 * i + 1]);
        float c = p.cos[(u64)blockIdx.x * (p.rope / 2) + i], s = p.sin[(u64)blockIdx.x * (p.rope / 2) + i];
        *(u32*)(y + p.n + 2 * i) = pack_bf16(even * c - odd * s, even * s + odd * c);
    }
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
        if (p.fp8) {
            u16 bytes;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
                : "=h"(bytes)
                : "f"(from_bf16((u16)(pair >> 16))), "f"(from_bf16((u16)pair)));
            ((u16*)(p.cache + slot * p.width))[i] = bytes;
        } else {
            ((u32*)(p.cache + slot * p.width * 2))[i] = pair;
        }
    }
}

// ---- the router: FP32 weights, then each token's experts

struct RouterParameters {
    const u16* x;         // [rows][stride]
    const float* weight;  // [out][width], width a multiple of 4
    float* y;             // [rows][out]
    int rows, width, out, stride;
};

// A block an output.
extern "C" __global__ void __launch_bounds__(256) router(const __grid_constant__ RouterParameters p) {
    constexpr int HELD = 8;  // of a thread's weights, asked for before the activations exist
    const float* weight = p.weight + (u64)blockIdx.x * p.width;
    float4 held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = (i * 256 + (int)threadIdx.x) * 4;
        held[i] = at < p.width ? *(const float4*)(weight + at) : float4{0, 0, 0, 0};
    }
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int row = 0; row < p.rows; row++) {
        const u16* x = p.x + (u64)row * p.stride;
        float sum = 0.0f;
        auto add = [&](float4 w, int at) {
            u32 low = *(const u32*)(x + at), high = *(const u32*)(x + at + 2);
            sum += w.x * from_bf16((u16)low) + w.y * from_bf16((u16)(low >> 16));
            sum += w.z * from_bf16((u16)high) + w.w * from_bf16((u16)(high >> 16));
        };
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int at = (i * 256 + (int)threadIdx.x) * 4;
            if (at < p.width) add(held[i], at);
        }
        for (int at = (HELD * 256 + (int)threadIdx.x) * 4; at < p.width; at += 256 * 4)
            add(*(const float4*)(weight + at), at);
        sum = block_sum(sum);
        if (threadIdx.x == 0) p.y[(u64)row * p.out + blockIdx.x] = sum;
    }
}

struct RouteParameters {
    const float* logits;  // [tokens][experts]
    const float* bias;    // [experts]
    long long* ids;       // [tokens][k]
    float* weights;       // [tokens][k]
    int tokens, experts, k, n_group, topk_group, normalize;
    float scaling;
};

constexpr int MAX_EXPERTS = 512, HERE = MAX_EXPERTS / 32;

// A warp a token.
extern "C" __global__ void __launch_bounds__(128) route(const __grid_constant__ RouteParameters p) {
    __shared__ float choices[4][MAX_EXPERTS];
    let_next_kernel_begin();
    wait_for_kernels_before();
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, token = (int)blockIdx.x * 4 + warp;
    if (token >= p.tokens) return;
    const float* logits = p.logits + (u64)token * p.experts;
    float score[HERE], choice[HERE];
#pragma unroll
    for (int i = 0; i < HERE; i++) {
        int expert = i * 32 + lane;
        score[i] = 0.0f, choice[i] = NOTHING;
        if (expert < p.experts) {
            score[i] = 1.0f / (1.0f + expf(-logits[expert]));
            choice[i] = score[i] + p.bias[expert];
            choices[warp][expert] = choice[i];
        }
    }
    __syncwarp();
    if (p.n_group > 1) {  // at most 32 groups: a lane a group
        int size = p.experts / p.n_group;
        float first = NOTHING, second = NOTHING;
        if (lane < p.n_group)
            for (int i = 0; i < size; i++) {
                float c = choices[warp][lane * size + i];
                if (c > first) second = first, first = c;
                else if (c > second) second = c;
            }
        float own = lane < p.n_group ? first + second : NOTHING;
        int better = 0;
        for (int other = 0; other < p.n_group; other++) {
            float theirs = __shfl_sync(~0u, own, other);
            better += theirs > own || (theirs == own && other < lane);
        }
        u32 kept = __ballot_sync(~0u, lane < p.n_group && better < p.topk_group);
#pragma unroll
        for (int i = 0; i < HERE; i++)
            if (i * 32 + lane < p.experts && !(kept >> ((i * 32 + lane) / size) & 1)) choice[i] = NOTHING;
    }
    float weight = 0.0f, total = 0.0f;
    int id = 0;
    for (int turn = 0; turn < p.k; turn++) {
        float best = NOTHING;
        int expert = MAX_EXPERTS;
#pragma unroll
        for (int i = 0; i < HERE; i++)
            if (choice[i] > best) best = choice[i], expert = i * 32 + lane;
#pragma unroll
        for (int step = 16; step; step >>= 1) {
            float theirs = __shfl_xor_sync(~0u, best, step);
            int other = __shfl_xor_sync(~0u, expert, step);
            if (theirs > best || (theirs == best && other < expert)) best = theirs, expert = other;
        }
        if (expert == MAX_EXPERTS) expert = turn;  // NaN everywhere: any experts, as long as there are k
        float own = 0.0f;
#pragma unroll
        for (int i = 0; i < HERE; i++)
            if (i * 32 + lane == expert) own = score[i], choice[i] = NOTHING;
        own = __shfl_sync(~0u, own, expert & 31);
        total += own;
        if (lane == turn) weight = own, id = expert;
    }
    if (lane < p.k) {
        if (p.normalize) weight /= total + 1e-20f;
        p.ids[(u64)token * p.k + lane] = id;
        p.weights[(u64)token * p.k + lane] = weight * p.scaling;
    }
}
