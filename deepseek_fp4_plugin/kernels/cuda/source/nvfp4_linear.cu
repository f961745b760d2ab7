// Few activation rows times NVFP4 weights.
//
// A block takes one set of outputs after the other; its warps share the inputs, and so do the blocks of a cluster. Every
// warp has a ring of slabs that bulk copies fill: it asks for the first ones before it waits for the kernel that makes
// the activations, and for another one as soon as one is used up, on into the next set of outputs. So weights keep
// arriving while earlier ones are multiplied and while sums are added. Sums of warps and blocks have a fixed order.
//
// ROWS8: columns of 8 activation rows a warp multiplies at a time.  GROUPS: groups of 16 outputs a warp has.
// GATED: outputs are gate and up in turns of 8, and silu(gate) * up is what is stored.
#include "nvfp4.cuh"

struct Parameters {
    const u8* tiles;         // [groups][slabs][1152]
    const float* row_scale;  // [groups * 16], in the order of the tiles
    const u16* x;            // [rows][x_stride]
    u16* y;                  // [rows][y_stride]
    int rows, width, x_stride, y_stride;
    int groups, slabs, warps_m, warps_k;
    int out;      // outputs, both of gate and up
    int half;     // 0, or outputs of gate where gate and up take turns
};

constexpr int STAGES = GROUPS == 1 ? 6 : 4;  // slabs of a warp that are under way
constexpr int STAGE_BYTES = GROUPS * SLAB_BYTES;
constexpr int MAX_WARPS = ROWS8 <= 2 ? 16 : 8;
constexpr int STRIDE = 8 * ROWS8 + 1;
constexpr int DEPTH = ROWS8 == 1 ? 4 : 2;  // tiles of activations under way

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS) nvfp4_linear(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(8) u64 barriers[MAX_WARPS * STAGES];
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int warp_m = warp / p.warps_k, warp_k = warp - warp_m * p.warps_k, warps = p.warps_m * p.warps_k;
    int cluster = (int)cluster_size(), rank = (int)cluster_rank();
    int block_groups = p.warps_m * GROUPS, block_rows = block_groups * 16;
    int slab_begin = rank * p.slabs / cluster, block_slabs = (rank + 1) * p.slabs / cluster - slab_begin;
    int begin = slab_begin + warp_k * block_slabs / p.warps_k;
    int count = slab_begin + (warp_k + 1) * block_slabs / p.warps_k - begin;
    int block = (int)blockIdx.x / cluster, blocks = (int)gridDim.x / cluster;
    int sets = (p.groups + block_groups - 1) / block_groups, items = (sets - block + blocks - 1) / blocks;
    int rows = p.rows;
    int chunks = (rows + 8 * ROWS8 - 1) / (8 * ROWS8);

    // Two sets of sums and scales, so that a set is added up while the next one is multiplied.
    float* sums = (float*)memory;
    int sums_size = p.warps_k * block_rows * STRIDE;
    float* scales = sums + 2 * sums_size;
    u32 ring = (shared_address(scales + 2 * block_rows) + 127) / 128 * 128 + warp * STAGES * STAGE_BYTES;
    u32 barrier = shared_address(barriers + warp * STAGES);
    int total = items * chunks * count, asked = 0, ask_slab = 0, ask_chunk = 0, ask_item = 0;
    auto fill = [&]() {
        if (asked == total) return;
        u32 slot = asked % STAGES;
        int group = (block + ask_item * blocks) * block_groups + warp_m * GROUPS;
        const u8* from = p.tiles + ((u64)group * p.slabs + begin + ask_slab) * SLAB_BYTES;
        int present = min(GROUPS, p.groups - group);
        if (elected()) {
            barrier_expect(barrier + 8 * slot, present > 0 ? present * SLAB_BYTES : 0);
            for (int i = 0; i < present; i++)
                bulk_copy(ring + slot * STAGE_BYTES + i * SLAB_BYTES, from + (u64)i * p.slabs * SLAB_BYTES, SLAB_BYTES,
                          barrier + 8 * slot);
        }
        asked++;
        if (++ask_slab == count) {
            ask_slab = 0;
            if (++ask_chunk == chunks) ask_chunk = 0, ask_item++;
        }
    };
    if (lane == 0) {
        for (int stage = 0; stage < STAGES; stage++) barrier_init(barrier + 8 * stage, 1);
        barrier_fence();
    }
    __syncwarp();
    for (int stage = 0; stage < STAGES; stage++) fill();
    let_next_kernel_begin();
    wait_for_kernels_before();

    u32 slot = 0, parity = 0;
    int turn = 0;
    for (int item = 0; item < items; item++) {
        int first_group = (block + item * blocks) * block_groups;
        float scale = (int)threadIdx.x < block_rows && first_group * 16 + (int)threadIdx.x < p.groups * 16
                          ? p.row_scale[first_group * 16 + threadIdx.x]
                          : 0.0f;
        for (int row0 = 0; row0 < rows; row0 += 8 * ROWS8, turn ^= 1) {
            float acc[GROUPS][CHAINS<ROWS8>][ROWS8][4] = {};
            const u16* row[ROWS8];  // a lane's first activation of each of its rows, and how many lie from it to the last
            int last[ROWS8], input = begin * SLAB_INPUTS + quarter * 16;
#pragma unroll
            for (int c = 0; c < ROWS8; c++) {
                int r = row0 + 8 * c + g;
                last[c] = r < rows ? min(p.width - input, count * SLAB_INPUTS) : 0;
                row[c] = p.x + (u64)r * p.x_stride + input;
            }
            // Activations are asked for some tiles ahead: their way from the second cache is longer than a tile's products.
            // Inputs past the width meet zero weights, so that they may be any finite numbers.
            Quad x[DEPTH][ROWS8][2] = {};
            auto ask = [&](Quad (&to)[ROWS8][2], int offset) {
#pragma unroll
                for (int c = 0; c < ROWS8; c++) {
                    bool wanted = offset < last[c];
                    load_quad_if(to[c][0], row[c] + offset, wanted);
                    load_quad_if(to[c][1], row[c] + offset + 8, wanted);
                }
            };
#pragma unroll
            for (int d = 0; d < DEPTH; d++) ask(x[d], d * 64);
            int offset = DEPTH * 64;
            for (int slab = 0; slab < count; slab += DEPTH / 2) {
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    if (slab + d / 2 >= count) break;
                    if (!(d & 1)) barrier_wait(barrier + 8 * slot, parity);
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) {
                        u32 here = ring + slot * STAGE_BYTES + i * SLAB_BYTES;
                        multiply_tile<ROWS8>(acc[i], shared_quad(here + (d & 1) * TILE_BYTES + lane * 16),
                                             shared_word(here + SCALES_OFFSET + lane * 4), d & 1, x[d]);
                    }
                    if (d & 1) {
                        __syncwarp();
                        fill();
                        if (++slot == STAGES) slot = 0, parity ^= 1;
                    }
                    ask(x[d], offset);
                    offset += 64;
                }
            }

            // Sums of the warps that share outputs, then of the cluster's blocks.
            float* here = sums + turn * sums_size;
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                float* own = here + ((u64)(warp_k * block_groups + warp_m * GROUPS + i) * 16 + g) * STRIDE + 2 * quarter;
#pragma unroll
                for (int c = 0; c < ROWS8; c++)
                    for (int n = 0; n < 4; n++)
                        own[(n >> 1) * 8 * STRIDE + 8 * c + (n & 1)] =
                            acc[i][0][c][n] + (CHAINS<ROWS8> > 1 ? acc[i][CHAINS<ROWS8> - 1][c][n] : 0.0f);
            }
            float* factor = scales + turn * block_rows;
            if ((int)threadIdx.x < block_rows) factor[threadIdx.x] = scale;
            __syncthreads();
            int present = min(rows - row0, 8 * ROWS8);
            if (cluster > 1) {
                for (int i = threadIdx.x; i < block_rows * present; i += 32 * warps) {
                    float* at = here + (i % block_rows) * STRIDE + i / block_rows;
                    float sum = *at;
                    for (int w = 1; w < p.warps_k; w++) sum += at[w * block_rows * STRIDE];
                    *at = sum;
                }
                cluster_barrier();
            }
            auto value = [&](int output, int column) {
                float* at = here + output * STRIDE + column;
                float sum = 0;
                if (cluster > 1) {
                    for (int r = 0; r < cluster; r++) sum += cluster_float(shared_address(at), r);
                } else {
                    for (int w = 0; w < p.warps_k; w++) sum += at[w * block_rows * STRIDE];
                }
                return sum * factor[output];
            };
            int outputs = GATED ? block_rows / 2 : block_rows;
#pragma unroll 2
            for (int i = threadIdx.x + rank * 32 * warps; i < outputs * present; i += 32 * warps * cluster) {
                int output = i % outputs, column = i / outputs;
                if (first_group + output / (GATED ? 8 : 16) >= p.groups) continue;
                u16* y = p.y + (u64)(row0 + column) * p.y_stride;
#if GATED
                // Rounded where the reference rounds.
                int at = (output >> 3) * 16 + (output & 7), n = first_group * 8 + output;
                float gate = round_bf16(value(at, column)), up = round_bf16(value(at + 8, column));
                if (n < p.half) y[n] = to_bf16(round_bf16(silu(gate)) * up);
#else
                int n = first_group * 16 + output, limit = p.out;
                if (p.half) n = (first_group + (output >> 4)) * 8 + (output & 7), limit = p.half;
                if (n < limit) y[(p.half && (output & 8) ? p.half : 0) + n] = to_bf16(value(output, column));
#endif
            }
            if (cluster > 1) cluster_barrier();
        }
    }
}
