// The router: scores of BF16 rows by all experts, FP32 sums of exact products, then each token's best experts.
//
// Its weight is BF16 [parts][experts][width], the sum of its parts. Few tokens take one launch (`router`), some more two
// (`router_slice`, `route_slices`), of many the library makes the products (`route`).
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
    const long long* slots;  // [experts], where they are held
    long long* places;       // [tokens][k], the slots of the ids; or none
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A warp that chooses. A lane has experts lane, 32 + lane, ...; some lanes share a group's experts.
struct Chooser {
    struct Memory {
        float score[32 * SLOTS], choice[32 * SLOTS];
        int picked[32], place[32 * SLOTS];
    };
    float bias[SLOTS];
    int group_at[SLOTS];  // the first lane of an expert's group
    int place[SLOTS];
    int lane, size, lanes;  // experts and lanes of a group

    __device__ inline explicit Chooser(const Choice& p) {
        lane = threadIdx.x & 31, size = p.experts / p.n_group, lanes = 1 << (31 - __clz(32 / p.n_group));
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            int expert = 32 * s + lane;
            bias[s] = expert < p.experts ? p.bias[expert] : 0.0f, group_at[s] = expert / size * lanes;
            place[s] = p.places && expert < p.experts ? (int)p.slots[expert] : 0;
        }
    }

    // Bits of the first lanes of the groups that are kept, those with the largest sums of their two best.
    __device__ inline u32 kept_groups(const Choice& p, const float* choice) const {
        int group = lane / lanes, part = lane % lanes;
        float best = NOTHING, second = NOTHING;
        if (group < p.n_group) {
            int turns = (size + lanes - 1) / lanes, turn = group % turns;  // groups begin at different banks
#pragma unroll 8
            for (int i = 0; i < turns; i++) {
                int at = turn * lanes + part;
                float value = at < size ? choice[group * size + at] : NOTHING;
                second = fmaxf(second, fminf(best, value)), best = fmaxf(best, value);
                if (++turn == turns) turn = 0;
            }
        }
        for (int step = lanes / 2; step; step /= 2) {
            float other = __shfl_xor_sync(~0u, best, step), next = __shfl_xor_sync(~0u, second, step);
            second = fmaxf(fminf(best, other), fmaxf(second, next)), best = fmaxf(best, other);
        }
        float sum = best + second;
        int rank = 0;
#pragma unroll 8
        for (int other = 0; other < p.n_group; other++) {
            float theirs = __shfl_sync(~0u, sum, other * lanes);
            rank += theirs > sum || (theirs == sum && other < group);
        }
        return __ballot_sync(~0u, group < p.n_group && rank < p.topk_group);
    }

    __device__ inline void choose(const Choice& p, int token, const float (&score)[SLOTS], Memory& memory) const {
        float choice[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            choice[s] = score[s] + bias[s];
            if (!(choice[s] > NOTHING)) choice[s] = -3.4e38f;  // NaN: behind all others, but there
            memory.score[32 * s + lane] = score[s], memory.choice[32 * s + lane] = choice[s];
            memory.place[32 * s + lane] = place[s];
        }
        __syncwarp();
        u32 kept = p.n_group > 1 ? kept_groups(p, memory.choice) : ~0u;
        // Numbers in the order of the floats, 0 for what cannot be chosen; then a lane's largest first.
        u32 key[SLOTS];
        int slot[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            u32 bits = __float_as_uint(choice[s]);
            bool possible = 32 * s + lane < p.experts && (p.n_group == 1 || kept >> (group_at[s] & 31) & 1);
            key[s] = possible ? bits ^ ((u32)((int)bits >> 31) | 0x80000000u) : 0, slot[s] = s;
        }
#pragma unroll
        for (int round = 0; round < SLOTS; round++)
#pragma unroll
            for (int s = round & 1; s + 1 < SLOTS; s += 2) {
                bool swap = key[s] < key[s + 1];
                u32 more = swap ? key[s + 1] : key[s], less = swap ? key[s] : key[s + 1];
                int first = swap ? slot[s + 1] : slot[s], next = swap ? slot[s] : slot[s + 1];
                key[s] = more, key[s + 1] = less, slot[s] = first, slot[s + 1] = next;
            }
        for (int r = 0; r < p.k; r++) {
            u32 most = __reduce_max_sync(~0u, key[0]), best = __ballot_sync(~0u, key[0] == most);
            int winner = __ffs(best) - 1;
            if (best & (best - 1))  // of equals the first expert
                winner = (int)__reduce_min_sync(~0u, key[0] == most ? (u32)(32 * slot[0] + lane) : ~0u) & 31;
            if (lane == winner) {
                memory.picked[r] = 32 * slot[0] + lane;
#pragma unroll
                for (int s = 0; s + 1 < SLOTS; s++) key[s] = key[s + 1], slot[s] = slot[s + 1];
                key[SLOTS - 1] = 0;
            }
        }
        __syncwarp();
        int own = lane < p.k ? memory.picked[lane] : 0;
        float own_score = memory.score[own], total = 0.0f;
#pragma unroll 8
        for (int r = 0; r < p.k; r++) total += __shfl_sync(~0u, own_score, r);
        if (lane < p.k) {
            p.ids[(u64)token * p.k + lane] = own;
            if (p.places) p.places[(u64)token * p.k + lane] = memory.place[own];
            p.weights[(u64)token * p.k + lane] = (p.normalize ? own_score / (total + 1e-20f) : own_score) * p.scaling;
        }
        __syncwarp();
    }
};

constexpr int CHOOSERS = 4;  // warps of a block

extern "C" __global__ void __launch_bounds__(32 * CHOOSERS) route(const __grid_constant__ Choice p) {
    __shared__ Chooser::Memory memory[CHOOSERS];
    int warp = threadIdx.x >> 5;
    let_next_kernel_begin();
    wait_for_kernels_before();
    Chooser chooser(p);
    for (int token = (int)blockIdx.x * CHOOSERS + warp; token < p.tokens; token += (int)gridDim.x * CHOOSERS) {
        const float* logits = p.logits + (u64)token * p.experts + chooser.lane;
        float score[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++) score[s] = 32 * s + chooser.lane < p.experts ? logits[32 * s] : 0.0f;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) score[s] = sigmoid(score[s]);
        chooser.choose(p, token, score, memory[warp]);
    }
}

constexpr int FEW = 4;         // tokens
constexpr float NONE = -1.0f;  // no score yet: scores are not below zero

struct Parameters {
    const u16* x;       // [tokens][stride], stride a multiple of 8
    const u16* weight;  // width a multiple of 8
    float* scores;      // [FEW][experts]; NONE before and after
    int width, stride, parts, tokens, experts;
    long long* ids;  // the rest of `Choice`
    float* weights;
    const float* bias;
    const long long* slots;
    long long* places;
    int k, n_group, topk_group, normalize;
    float scaling;
};

__device__ inline void store_score(float* pointer, float value) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}

constexpr int HELD = 4;  // pieces of a thread's weights that are asked for before the activations exist

// A thread's sums for TOKENS tokens at most.
template <int TOKENS>
__device__ inline void products(const Parameters& p, const u16* weight, const Quad (&held)[HELD], float (&sums)[FEW]) {
    int thread = threadIdx.x, pieces = p.width / 8;
    auto add_product = [](float& sum, const Quad& w, const Quad& x) {
        const u32 a[4] = {w.x, w.y, w.z, w.w}, b[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += from_bf16((u16)a[i]) * from_bf16((u16)b[i]);
            sum += from_bf16((u16)(a[i] >> 16)) * from_bf16((u16)(b[i] >> 16));
        }
    };
    Quad x[HELD][TOKENS] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            load_quad_if(x[i][t], p.x + (u64)t * p.stride + (i * 256 + thread) * 8, i * 256 + thread < pieces && t < p.tokens);
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) add_product(sums[t], held[i], x[i][t]);
    for (int i = min(pieces, HELD * 256) + thread; i < pieces * p.parts; i += 256) {  // long rows, further parts
        int part = i / pieces, piece = i - part * pieces;
        Quad w = load_weights(weight + (u64)part * p.experts * p.width + piece * 8);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (t < p.tokens) add_product(sums[t], w, load_quad(p.x + (u64)t * p.stride + piece * 8));
    }
#pragma unroll
    for (int step = 16; step; step >>= 1)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums[t] += __shfl_xor_sync(~0u, sums[t], step);
}

// Few tokens: a block an expert. The first block's warps wait for a token's scores each, which are their own messages,
// and choose.
extern "C" __global__ void __launch_bounds__(256, 2) router(const __grid_constant__ Parameters p) {
    __shared__ float parts[FEW][8];
    __shared__ Chooser::Memory memory[FEW];
    int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    const u16* weight = p.weight + (u64)blockIdx.x * p.width;
    Quad held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = Quad{0, 0, 0, 0};
        if (i * 256 + thread < p.width / 8) held[i] = load_weights(weight + (i * 256 + thread) * 8);
    }
    wait_for_kernels_before();
    let_next_kernel_begin();
    float sums[FEW] = {};
    if (p.tokens == 1) products<1>(p, weight, held, sums);
    else products<FEW>(p, weight, held, sums);
    if (lane == 0)
#pragma unroll
        for (int t = 0; t < FEW; t++) parts[t][warp] = sums[t];
    __syncthreads();
    if (thread < p.tokens) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; w++) sum += parts[thread][w];
        store_score(p.scores + thread * p.experts + blockIdx.x, sigmoid(sum));
    }
    if (blockIdx.x || warp >= p.tokens) return;
    Choice choice{nullptr,   p.bias,       p.ids,       p.weights, p.tokens, p.experts, p.k,
                  p.n_group, p.topk_group, p.normalize, p.scaling, p.slots,  p.places};
    Chooser chooser(choice);
    float score[SLOTS], *scores = p.scores + warp * p.experts + lane;
    bool missing;
    do {
        missing = false;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) score[s] = 32 * s + lane < p.experts ? load_early(scores + 32 * s) : 0.0f;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) missing |= score[s] == NONE;
    } while (__any_sync(~0u, missing));
#pragma unroll
    for (int s = 0; s < SLOTS; s++)
        if (32 * s + lane < p.experts) scores[32 * s] = NONE;
    chooser.choose(choice, warp, score, memory[warp]);
}

// ---- more tokens: products by the tensor core, each block a slice of the inputs

constexpr int SLICES = 8, SLICE_WARPS = 7;  // of a block, so that a warp has 128 of R1's inputs
constexpr int SQUARE = 32;                  // experts and tokens of a block
constexpr int PIECES = 4;                   // of 32 inputs, that a warp takes at a time
constexpr int ROW = SQUARE + 4;             // of sums: lanes that store together meet no bank twice

struct SliceParameters {
    const u16* x;       // [tokens][stride]
    const u16* weight;  // [experts][width], experts a multiple of SQUARE, width of 8
    float* logits;      // [SLICES][tokens][experts]
    int width, stride, tokens, experts;
};

// Grid: blocks of experts, slices, blocks of tokens. The order of inputs is free, so that a lane has 8 that lie together.
extern "C" __global__ void __launch_bounds__(32 * SLICE_WARPS, 1) router_slice(const __grid_constant__ SliceParameters p) {
    __shared__ float sums[SLICE_WARPS][SQUARE][ROW];  // [.][token][expert]
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int first_expert = (int)blockIdx.x * SQUARE, first_token = (int)blockIdx.z * SQUARE;
    constexpr int SPAN = 32 * PIECES, STEP = SLICES * SLICE_WARPS * SPAN;
    int begin = ((int)blockIdx.y * SLICE_WARPS + warp) * SPAN + quarter * 8;
    const u16* weight = p.weight + (u64)(first_expert + g) * p.width;
    const u16* x = p.x + (u64)(first_token + g) * p.stride;
    Quad w[PIECES][4] = {}, states[PIECES][4] = {};
    auto ask_weights = [&](int from) {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (from + 32 * i < p.width) w[i][row] = load_weights(weight + (u64)8 * row * p.width + from + 32 * i);
    };
    ask_weights(begin);
    wait_for_kernels_before();
    let_next_kernel_begin();
    float acc[2][4][4] = {};
    for (int from = begin; from - quarter * 8 < p.width; from += STEP) {
        if (from > begin) ask_weights(from);
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int row = 0; row < 4; row++) {
                bool there = from + 32 * i < p.width && first_token + 8 * row + g < p.tokens;
                if (!there) states[i][row] = Quad{0, 0, 0, 0};
                load_quad_if(states[i][row], x + (u64)8 * row * p.stride + from + 32 * i, there);
            }
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {  // 16 experts
                const Quad &upper = w[i][2 * half], &lower = w[i][2 * half + 1];
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    mma(acc[half][t], {upper.x, lower.x, upper.y, lower.y}, states[i][t].x, states[i][t].y);
                    mma(acc[half][t], {upper.z, lower.z, upper.w, lower.w}, states[i][t].z, states[i][t].w);
                }
            }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int n = 0; n < 4; n++) sums[warp][8 * t + 2 * quarter + (n & 1)][16 * half + 8 * (n >> 1) + g] = acc[half][t][n];
    __syncthreads();
    float* to = p.logits + ((u64)blockIdx.y * p.tokens + first_token) * p.experts + first_expert;
    for (int i = threadIdx.x; i < SQUARE * SQUARE; i += 32 * SLICE_WARPS) {
        int token = i / SQUARE, expert = i % SQUARE;
        if (first_token + token >= p.tokens) break;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < SLICE_WARPS; w++) sum += sums[w][token][expert];
        to[(u64)token * p.experts + expert] = sum;
    }
}

// A block a token: the sums over slices, then its first warp chooses.  logits: [SLICES][tokens][experts].
extern "C" __global__ void __launch_bounds__(32 * SLOTS) route_slices(const __grid_constant__ Choice p) {
    __shared__ Chooser::Memory memory;
    int expert = threadIdx.x, token = (int)blockIdx.x;
    Chooser chooser(p);
    let_next_kernel_begin();
    wait_for_kernels_before();
    if (expert < p.experts) {
        float parts[SLICES], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SLICES; i++) parts[i] = p.logits[((u64)i * p.tokens + token) * p.experts + expert];
#pragma unroll
        for (int i = 0; i < SLICES; i++) sum += parts[i];
        memory.choice[expert] = sigmoid(sum);
    }
    __syncthreads();
    if (expert >= 32) return;
    float score[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) score[s] = 32 * s + chooser.lane < p.experts ? memory.choice[32 * s + chooser.lane] : 0.0f;
    __syncwarp();
    chooser.choose(p, token, score, memory);
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
