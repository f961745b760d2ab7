// The router: scores of BF16 rows by all experts, FP32 sums of exact products, then each token's best experts.
//
// Its weight is BF16 [parts][experts][width], the sum of its parts.
//
// SLOTS: experts of a lane where a warp chooses; 32 times as many at most.
#include "device.cuh"

struct Choice {
    const float* logits;  // [tokens][experts]
    const float* bias;    // [experts]
    long long* ids;       // [tokens][k]
    float* weights;       // [tokens][k]
    int tokens, experts, k, n_group, topk_group, normalize;  // groups and k: 32 at most
    float scaling;
};

__device__ inline float load_score(const float* pointer) {  // not from the first cache: another block may have written it
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(pointer) : "memory");
    return value;
}

// A warp's tokens: `first`, `first` + `step`, ...  of: [32 * SLOTS] in shared memory, the warp's own.
__device__ inline void choose(const Choice& p, int first, int step, float* of) {
    int lane = threadIdx.x & 31, size = p.experts / p.n_group;
    float bias[SLOTS];
    int group[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        int expert = 32 * s + lane;
        bias[s] = expert < p.experts ? p.bias[expert] : 0.0f, group[s] = expert / size;
    }
    for (int token = first; token < p.tokens; token += step) {
        float score[SLOTS], choice[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            score[s] = 32 * s + lane < p.experts ? load_score(p.logits + (u64)token * p.experts + 32 * s + lane) : 0.0f;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            score[s] = 1.0f / (1.0f + expf(-score[s]));
            choice[s] = score[s] + bias[s];
            if (!(choice[s] > NOTHING)) choice[s] = -3.4e38f;  // NaN: behind all others, but there
            of[32 * s + lane] = choice[s];
        }
        u32 kept = ~0u;
        __syncwarp();
        if (p.n_group > 1) {  // a lane a group
            float best = NOTHING, second = NOTHING;
            if (lane < p.n_group) {
                int at = lane % size;  // lanes begin at different banks
                for (int i = 0; i < size; i++) {
                    float value = of[lane * size + at];
                    second = fmaxf(second, fminf(best, value)), best = fmaxf(best, value);
                    if (++at == size) at = 0;
                }
            }
            float sum = best + second;
            int rank = 0;
            for (int other = 0; other < p.n_group; other++) {
                float theirs = __shfl_sync(~0u, sum, other);
                rank += theirs > sum || (theirs == sum && other < lane);
            }
            kept = __ballot_sync(~0u, lane < p.n_group && rank < p.topk_group);
        }
        // Numbers in the order of the floats; 0 for what cannot be chosen.
        u32 key[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            u32 bits = __float_as_uint(choice[s]);
            bool possible = 32 * s + lane < p.experts && (kept >> (group[s] & 31) & 1);
            key[s] = possible ? bits ^ ((u32)((int)bits >> 31) | 0x80000000u) : 0;
        }
        float total = 0.0f, own_score = 0.0f;
        int own = 0;
        for (int r = 0; r < p.k; r++) {  // lane r keeps the r-th
            u32 best = key[0];
            int slot = 0;
#pragma unroll
            for (int s = 1; s < SLOTS; s++)
                if (key[s] > best) best = key[s], slot = s;
            u32 most = __reduce_max_sync(~0u, best);
            int expert = (int)__reduce_min_sync(~0u, best == most ? (u32)(32 * slot + lane) : ~0u);  // of equals the first
            float picked = 0.0f;
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                if (32 * s + lane == expert) picked = score[s], key[s] = 0;
            picked = __shfl_sync(~0u, picked, expert & 31);
            total += picked;
            if (lane == r) own = expert, own_score = picked;
        }
        if (lane < p.k) {
            p.ids[(u64)token * p.k + lane] = own;
            p.weights[(u64)token * p.k + lane] = (p.normalize ? own_score / (total + 1e-20f) : own_score) * p.scaling;
        }
        __syncwarp();
    }
}

constexpr int CHOOSERS = 4;  // warps of a block

extern "C" __global__ void __launch_bounds__(32 * CHOOSERS) route(const __grid_constant__ Choice p) {
    __shared__ float choices[CHOOSERS][32 * SLOTS];
    int warp = threadIdx.x >> 5;
    let_next_kernel_begin();
    wait_for_kernels_before();
    choose(p, (int)blockIdx.x * CHOOSERS + warp, (int)gridDim.x * CHOOSERS, choices[warp]);
}

struct Parameters {
    const u16* x;       // [tokens][stride], stride a multiple of 8
    const u16* weight;  // width a multiple of 8
    float* logits;      // [tokens][experts]
    int* arrived;       // blocks of this launch; zero before and after
    int width, stride, parts, tokens, experts;
    long long* ids;  // the rest of `Choice`
    float* weights;
    const float* bias;
    int k, n_group, topk_group, normalize;
    float scaling;
};

constexpr int FEW = 4;  // tokens

// Few tokens: a block an expert. The block that is done last chooses.
extern "C" __global__ void __launch_bounds__(256) router(const __grid_constant__ Parameters p) {
    constexpr int HELD = 4;  // pieces of a thread's weights that are asked for before the activations exist
    __shared__ float sums[FEW][8], choices[FEW][32 * SLOTS];
    __shared__ bool last;
    int thread = threadIdx.x, warp = thread >> 5, pieces = p.width / 8;
    const u16* weight = p.weight + (u64)blockIdx.x * p.width;
    Quad held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = Quad{0, 0, 0, 0};
        if (i * 256 + thread < pieces) held[i] = load_weights(weight + (i * 256 + thread) * 8);
    }
    wait_for_kernels_before();
    let_next_kernel_begin();
    auto product = [](const Quad& w, const Quad& x) {
        const u32 a[4] = {w.x, w.y, w.z, w.w}, b[4] = {x.x, x.y, x.z, x.w};
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += from_bf16((u16)a[i]) * from_bf16((u16)b[i]);
            sum += from_bf16((u16)(a[i] >> 16)) * from_bf16((u16)(b[i] >> 16));
        }
        return sum;
    };
    for (int token = 0; token < p.tokens; token++) {
        const u16* x = p.x + (u64)token * p.stride;
        Quad own[HELD] = {};
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) load_quad_if(own[i], x + (i * 256 + thread) * 8, i * 256 + thread < pieces);
#pragma unroll
        for (int i = 0; i < HELD; i++) sum += product(held[i], own[i]);
        for (int i = min(pieces, HELD * 256) + thread; i < pieces * p.parts; i += 256) {  // long rows, further parts
            int part = i / pieces, piece = i - part * pieces;
            sum += product(load_weights(weight + (u64)part * p.experts * p.width + piece * 8), load_quad(x + piece * 8));
        }
#pragma unroll
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (!(thread & 31)) sums[token][warp] = sum;
    }
    __syncthreads();
    if (thread < p.tokens) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; w++) sum += sums[thread][w];
        p.logits[thread * p.experts + blockIdx.x] = sum;
        __threadfence();
    }
    __syncthreads();
    if (thread == 0) {
        last = atomicAdd(p.arrived, 1) == (int)gridDim.x - 1;
        if (last) *p.arrived = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last || warp >= FEW) return;
    Choice choice{p.logits, p.bias, p.ids, p.weights, p.tokens, p.experts, p.k, p.n_group, p.topk_group, p.normalize, p.scaling};
    choose(choice, warp, FEW, choices[warp]);
}

// ---- where a rank holds experts

struct LocalIdsParameters {
    const long long* ids;    // [count]
    const long long* slots;  // of each expert
    long long* places;       // [count]
    int count;
};

extern "C" __global__ void __launch_bounds__(256) local_ids(const __grid_constant__ LocalIdsParameters p) {
    int i = (int)blockIdx.x * 256 + (int)threadIdx.x;
    let_next_kernel_begin();
    wait_for_kernels_before();
    if (i < p.count) p.places[i] = p.slots[p.ids[i]];
}
