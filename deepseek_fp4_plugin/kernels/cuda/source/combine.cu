// What lies around the experts' products: SiLU of rows that are in the order of experts, and each token's weighted sum.
#include "device.cuh"

struct GatherParameters {
    const u16* x;          // [tokens][stride]
    const long long* order;  // [rows], choices in the order of experts
    const short* experts;  // [rows], of each; `count` and above: not here
    u16* y;                // [rows][width]
    int width, stride, count, k;  // width a multiple of 8
};

// Rows in the order of experts; those that are not here stay as they were.
extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ GatherParameters p) {
    let_next_kernel_begin();
    wait_for_kernels_before();
    int row = (int)blockIdx.x;
    if (p.experts[row] >= p.count) return;
    const u16* from = p.x + p.order[row] / p.k * p.stride;
    for (int i = (int)threadIdx.x * 8; i < p.width; i += 256 * 8) *(Quad*)(p.y + (u64)row * p.width + i) = load_quad(from + i);
}

struct ActivateParameters {
    const u16* gate_up;      // [rows][2 * width], gate then up, without the tensor scales
    const float* row_scale;  // [experts][scale_stride]: of gate, and 8 further of up
    const short* experts;    // [rows], of each; `count` and above: not here
    u16* y;                  // [rows][width]
    int width, scale_stride, count;  // width a multiple of 8
};

__device__ inline float half_of(const Quad& q, int i) {
    u32 word = i < 2 ? q.x : i < 4 ? q.y : i < 6 ? q.z : q.w;
    return from_bf16((u16)(word >> (i % 2 * 16)));
}

extern "C" __global__ void __launch_bounds__(128) activate(const __grid_constant__ ActivateParameters p) {
    int column = ((int)blockIdx.y * 128 + (int)threadIdx.x) * 8, row = (int)blockIdx.x;
    let_next_kernel_begin();
    wait_for_kernels_before();
    int expert = p.experts[row];
    if (column >= p.width || expert >= p.count) return;
    float gate_scale = p.row_scale[(u64)expert * p.scale_stride], up_scale = p.row_scale[(u64)expert * p.scale_stride + 8];
    const u16* from = p.gate_up + (u64)row * 2 * p.width + column;
    Quad gate = load_quad(from), up = load_quad(from + p.width);
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = round_bf16(silu(half_of(gate, 2 * i) * gate_scale)), high = round_bf16(silu(half_of(gate, 2 * i + 1) * gate_scale));
        out[i] = pack_bf16(low * half_of(up, 2 * i) * up_scale, high * half_of(up, 2 * i + 1) * up_scale);
    }
    *(Quad*)(p.y + (u64)row * p.width + column) = Quad{out[0], out[1], out[2], out[3]};
}

struct Parameters {
    const u16* outputs;      // [.][width], of each choice
    const int* places;       // [tokens * k], rows of `outputs`; null: in order
    const long long* ids;    // [tokens * k], below 0: not here, and its outputs were not written
    const float* weights;    // [tokens * k]
    u16* y;                  // [tokens][width]
    int width, k;            // width a multiple of 8
    int early;               // the kernels before waited for ids and weights: they are asked for before the outputs exist
};

constexpr int AT_ONCE = 8;  // pieces of rows that may be asked for together

// A block has CHUNKS * 1024 values of a token: many where tokens are many, so that its ids are not asked for again.
template <int CHUNKS>
__device__ inline void sum_choices(const Parameters& p) {
    constexpr int ROWS = AT_ONCE / CHUNKS;
    int column = ((int)blockIdx.x * CHUNKS * 128 + (int)threadIdx.x) * 8, first = (int)blockIdx.y * p.k, lane = threadIdx.x & 31;
    bool own = false;
    float weight = 0.0f;
    auto ask = [&](int begin) {  // a lane a choice; the weight without waiting for its id
        bool there = begin + lane < p.k;
        long long id = there ? load_early(p.ids + first + begin + lane) : -1;
        weight = there ? load_early(p.weights + first + begin + lane) : 0.0f;
        own = id >= 0;
    };
    if (p.early) ask(0);
    let_next_kernel_begin();
    wait_for_kernels_before();
    float sums[CHUNKS][8] = {};
    for (int begin = 0; begin < p.k; begin += 32) {
        if (begin || !p.early) ask(begin);
        int place = first + begin + lane;
        if (own && p.places) place = p.places[place];
        for (u32 left = __ballot_sync(~0u, own); left;) {
            Quad rows[ROWS][CHUNKS] = {};
            float factors[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int choice = left ? __ffs(left) - 1 : 0, row = __shfl_sync(~0u, place, choice);
                factors[i] = __shfl_sync(~0u, weight, choice);
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    int at = column + c * 1024;
                    load_quad_if(rows[i][c], p.outputs + (u64)row * p.width + at, left && at < p.width);
                }
                if (!left) factors[i] = 0.0f;
                left &= left - 1;
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    u32 words[4] = {rows[i][c].x, rows[i][c].y, rows[i][c].z, rows[i][c].w};
#pragma unroll
                    for (int n = 0; n < 8; n++) sums[c][n] += from_bf16((u16)(words[n / 2] >> (n % 2 * 16))) * factors[i];
                }
        }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int at = column + c * 1024;
        if (at < p.width) *(Quad*)(p.y + (u64)blockIdx.y * p.width + at) = rounded(sums[c]);
    }
}

// The bounds leave registers for all that is asked for together: without them the compiler takes one piece after the other.
extern "C" __global__ void __launch_bounds__(128, 8) combine(const __grid_constant__ Parameters p) { sum_choices<1>(p); }
extern "C" __global__ void __launch_bounds__(128, 5) combine_many(const __grid_constant__ Parameters p) { sum_choices<4>(p); }
