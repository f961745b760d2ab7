// The experts' second product and their weighted sum: y[t] = sum over k of weight[t, k] * down_e h[t, k].
//
// A block has some groups of 16 outputs of one token; each of its warps takes one of the token's experts, and the sum
// over warps, in order, is the weighted sum. Which experts were chosen, and their weights, are known before the hidden
// values are: two kernels ago, so all but these is asked for while the kernel before still runs.
//
// GROUPS: groups of outputs a block has.  WARPS: of a block.  MIN_BLOCKS: that a multiprocessor holds.
#include "nvfp4.cuh"

constexpr int DEPTH = 4;  // tiles of hidden values under way

struct Parameters {
    const u8* tiles;         // [experts][groups][slabs][1152]
    const float* row_scale;  // [experts][groups * 16]
    const u16* h;            // [tokens * k][h_stride]
    u16* y;                  // [tokens][y_stride]
    const long long* ids;    // [tokens * k]
    const float* weights;    // [tokens * k]
    int width, h_stride, y_stride, groups, slabs, out, k;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) nvfp4_experts_down(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(8) u64 barriers[WARPS];
    __shared__ float sums[WARPS][GROUPS * 16];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int first_group = (int)blockIdx.x * GROUPS, token = (int)blockIdx.y, choice = token * p.k + warp;
    int groups = min(GROUPS, p.groups - first_group);
    long long expert = load_early(p.ids + choice);
    u32 weights = shared_address(memory) + warp * GROUPS * p.slabs * SLAB_BYTES, barrier = shared_address(barriers + warp);
    if (lane == 0 && expert >= 0) {
        barrier_init(barrier, 1);
        barrier_fence();
        u32 bytes = groups * p.slabs * SLAB_BYTES;
        barrier_expect(barrier, bytes);
        bulk_copy_once(weights, p.tiles + ((u64)expert * p.groups + first_group) * p.slabs * SLAB_BYTES, bytes, barrier);
    }
    __syncwarp();
    float weight = 0.0f, scale[GROUPS][2] = {};
    if (quarter == 0 && expert >= 0) {
        weight = load_early(p.weights + choice);
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (i < groups) scale[i][half] = load_float(p.row_scale + (expert * p.groups + first_group + i) * 16 + half * 8 + g);
    }
    let_next_kernel_begin();
    wait_for_kernels_before();
    float acc[GROUPS][2][1][4] = {};
    if (expert >= 0) {
        Quad x[DEPTH][1][2] = {};
        const u16* h = p.h + (u64)choice * p.h_stride + quarter * 16;
        int last = g == 0 ? p.width - quarter * 16 : 0;
        auto ask = [&](Quad (&to)[1][2], int tile) {
            load_quad_if(to[0][0], h + tile * 64, tile * 64 < last);
            load_quad_if(to[0][1], h + tile * 64 + 8, tile * 64 < last);
        };
#pragma unroll
        for (int d = 0; d < DEPTH; d++) ask(x[d], d);
        barrier_wait(barrier, 0);
        for (int first = 0; first < 2 * p.slabs; first += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                int slab = (first + d) >> 1;
                if (slab >= p.slabs) break;
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    if (i >= groups) break;
                    u32 at = weights + (i * p.slabs + slab) * SLAB_BYTES;
                    multiply_tile<1>(acc[i], shared_quad(at + (d & 1) * TILE_BYTES + lane * 16),
                                     shared_word(at + SCALES_OFFSET + lane * 4), d & 1, x[d]);
                }
                ask(x[d], first + d + DEPTH);
            }
        }
    }
    if (quarter == 0)
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                sums[warp][i * 16 + half * 8 + g] =
                    round_bf16((acc[i][0][0][2 * half] + acc[i][1][0][2 * half]) * scale[i][half]) * weight;
    __syncthreads();
    for (int output = threadIdx.x; output < GROUPS * 16; output += 32 * WARPS) {
        int n = first_group * 16 + output;
        if (n >= p.out) continue;
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) total += sums[w][output];
        p.y[(u64)token * p.y_stride + n] = to_bf16(total);
    }
}
