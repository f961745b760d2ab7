// Few activation rows times NVFP4 weights: dense, or each expert's with the rows that chose it.
//
// A block takes some groups of 16 outputs; its warps share the inputs, and so do the blocks of a cluster. Every warp
// asks for all of its weights at once, by bulk copies that arrive in shared memory, before it waits for the kernel that
// makes the activations. Sums of warps and blocks are added in a fixed order.
//
// ROWS8: columns of 8 activation rows a warp multiplies at a time.  GROUPS: groups of outputs a warp has.
// GATED: outputs are gate and up in turns of 8, and silu(gate) * up is what is stored.
// EXPERTS: the second axis of the grid is a choice (token, expert); one block does all rows of an expert.
#include "nvfp4.cuh"

struct Parameters {
    const u8* tiles;         // [experts][groups][slabs][1152]
    const float* row_scale;  // [experts][groups * 16], in the order of the tiles
    const u16* x;            // [rows][x_stride]
    u16* y;                  // [rows][y_stride]; of EXPERTS [choices][y_stride]
    const long long* ids;    // of EXPERTS [choices], below 0: not here
    int rows, width, x_stride, y_stride;
    int groups, slabs, warps_m, warps_k;
    int out;      // outputs, both of gate and up
    int half;     // 0, or outputs of gate where gate and up take turns
    int choices;  // of EXPERTS: tokens times k
    int k;
};

constexpr int PARTS = 4;  // a warp's weights arrive in so many pieces
constexpr int MAX_ROWS = 512;
constexpr int STRIDE = 8 * ROWS8 + 1;
constexpr int DEPTH = ROWS8 == 1 ? 4 : 2;  // tiles of activations under way
constexpr int THREADS = ROWS8 <= 2 ? 512 : 256;
#if EXPERTS
// The choices that took this expert, in order; false where an earlier choice has it.
__device__ bool find_rows(const Parameters& p, int expert, int choice, u16* list, int* count) {
    int lane = threadIdx.x & 31;
    bool earlier = false;
    for (int i = lane; i < choice; i += 32) earlier |= p.ids[i] == expert;
    if (__any_sync(~0u, earlier)) return false;
    if (threadIdx.x < 32) {
        int found = 0;
        for (int base = choice; base < p.choices; base += 32) {
            bool mine = base + lane < p.choices && p.ids[base + lane] == expert;
            u32 all = __ballot_sync(~0u, mine);
            if (mine) list[found + __popc(all & ((1u << lane) - 1))] = (u16)(base + lane);
            found += __popc(all);
        }
        if (lane == 0) *count = found;
    }
    return true;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) nvfp4_linear(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(8) u64 barriers[16 * PARTS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int warp_m = warp / p.warps_k, warp_k = warp - warp_m * p.warps_k;
    int cluster = (int)cluster_size(), rank = (int)cluster_rank();
    int block_groups = p.warps_m * GROUPS, first_group = (int)(blockIdx.x / cluster) * block_groups;
    int slab_begin = rank * p.slabs / cluster, block_slabs = (rank + 1) * p.slabs / cluster - slab_begin;
    int begin = warp_k * block_slabs / p.warps_k, end = (warp_k + 1) * block_slabs / p.warps_k;
    const u8* tiles = p.tiles;
    const float* row_scale = p.row_scale;
    int rows = p.rows;

#if EXPERTS
    __shared__ u16 list[MAX_ROWS];
    __shared__ int count;
    wait_for_kernels_before();
    let_next_kernel_begin();  // only now: the next kernel may then read the choices, which an earlier one made
    int choice = (int)blockIdx.y;
    long long expert = p.ids[choice];
    if (expert < 0 || !find_rows(p, (int)expert, choice, list, &count)) return;
    tiles += (u64)expert * p.groups * p.slabs * SLAB_BYTES;
    row_scale += expert * p.groups * 16;
#endif

    // Sums lie first: they must be where the cluster's other blocks have theirs, and those may have fewer slabs.
    float* sums = (float*)memory;
    u32 sums_bytes = (p.warps_k * block_groups * 16 * STRIDE * 4 + 127) / 128 * 128;
    u32 weights = shared_address(memory) + sums_bytes, barrier = shared_address(barriers + warp * PARTS);
    if (lane == 0) {
        for (int part = 0; part < PARTS; part++) barrier_init(barrier + 8 * part, 1);
        barrier_fence();
        for (int part = 0; part < PARTS; part++) {
            int from = begin + part * (end - begin) / PARTS, until = begin + (part + 1) * (end - begin) / PARTS;
            u32 bytes = (until - from) * SLAB_BYTES;
            if (!bytes) continue;
            u32 whole = 0;
            for (int i = 0; i < GROUPS; i++) whole += first_group + warp_m * GROUPS + i < p.groups ? bytes : 0;
            barrier_expect(barrier + 8 * part, whole);
            for (int i = 0; i < GROUPS; i++) {
                int local = warp_m * GROUPS + i, group = first_group + local;
                if (group < p.groups)
                    bulk_copy(weights + (local * block_slabs + from) * SLAB_BYTES,
                              tiles + ((u64)group * p.slabs + slab_begin + from) * SLAB_BYTES, bytes,
                              barrier + 8 * part);
            }
        }
    }
#if EXPERTS
    __syncthreads();
    rows = count;
#else
    __syncwarp();
    let_next_kernel_begin();
    wait_for_kernels_before();
#endif

    for (int row0 = 0; row0 < rows; row0 += 8 * ROWS8) {
        float acc[GROUPS][CHAINS<ROWS8>][ROWS8][4] = {};
        const u16* row[ROWS8];  // a lane's first activation of each of its rows, and how many lie from there to its last
        int last[ROWS8], input = (slab_begin + begin) * SLAB_INPUTS + quarter * 16;
#pragma unroll
        for (int c = 0; c < ROWS8; c++) {
            int r = row0 + 8 * c + g;
            last[c] = r < rows ? min(p.width - input, (end - begin) * SLAB_INPUTS) : 0;
#if EXPERTS
            row[c] = p.x + (u64)(r < rows ? list[r] / p.k : 0) * p.x_stride + input;
#else
            row[c] = p.x + (u64)r * p.x_stride + input;
#endif
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
        int part = 0, arrived = begin, offset = DEPTH * 64;
        u32 at = weights + (warp_m * GROUPS * block_slabs + begin) * SLAB_BYTES;
        for (int slab = begin; slab < end; slab += DEPTH / 2) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (slab + d / 2 >= end) break;
                while (!(d & 1) && arrived <= slab + d / 2) {
                    int until = begin + (part + 1) * (end - begin) / PARTS;
                    if (until > arrived) barrier_wait(barrier + 8 * part, 0);
                    arrived = until, part++;
                }
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    u32 here = at + i * block_slabs * SLAB_BYTES + (d & 1) * TILE_BYTES;
                    multiply_tile<ROWS8>(acc[i], shared_quad(here + lane * 16),
                                         shared_word(here + lane * 4 + SCALES_OFFSET - (d & 1) * TILE_BYTES), d & 1, x[d]);
                }
                if (d & 1) at += SLAB_BYTES;
                ask(x[d], offset);
                offset += 64;
            }
        }

        // Sums of the warps that share outputs, then of the cluster's blocks.
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            float* own = sums + ((u64)(warp_k * block_groups + warp_m * GROUPS + i) * 16 + g) * STRIDE + 2 * quarter;
#pragma unroll
            for (int c = 0; c < ROWS8; c++) {
                for (int n = 0; n < 4; n++)
                    own[(n >> 1) * 8 * STRIDE + 8 * c + (n & 1)] = acc[i][0][c][n] + (CHAINS<ROWS8> > 1 ? acc[i][CHAINS<ROWS8> - 1][c][n] : 0.0f);
            }
        }
        __syncthreads();
        int block_rows = block_groups * 16, here = min(rows - row0, 8 * ROWS8);
        if (cluster > 1) {
            for (int i = threadIdx.x; i < block_rows * here; i += blockDim.x) {
                float* at = sums + (i % block_rows) * STRIDE + i / block_rows;
                float total = *at;
                for (int w = 1; w < p.warps_k; w++) total += at[w * block_rows * STRIDE];
                *at = total;
            }
            cluster_barrier();
        }
        auto value = [&](int output, int column) {
            float* at = sums + output * STRIDE + column;
            float total = 0;
            if (cluster > 1) {
                for (int r = 0; r < cluster; r++) total += cluster_float(shared_address(at), r);
            } else {
                for (int w = 0; w < p.warps_k; w++) total += at[w * block_rows * STRIDE];
            }
            return total * row_scale[first_group * 16 + output];
        };
        int outputs = GATED ? block_rows / 2 : block_rows;
        for (int i = threadIdx.x + rank * blockDim.x; i < outputs * here; i += blockDim.x * cluster) {
            int output = i % outputs, column = i / outputs;
            if (first_group + output / (GATED ? 8 : 16) >= p.groups) continue;
#if EXPERTS
            u16* y = p.y + (u64)list[row0 + column] * p.y_stride;
#else
            u16* y = p.y + (u64)(row0 + column) * p.y_stride;
#endif
#if GATED
            int at = (output >> 3) * 16 + (output & 7), n = first_group * 8 + output;
            if (n < p.half) y[n] = to_bf16(silu(value(at, column)) * value(at + 8, column));
#else
            int n = first_group * 16 + output, limit = p.out;
            if (p.half) {
                n = (first_group + (output >> 4)) * 8 + (output & 7), limit = p.half;
                if (n < limit) y[(output & 8 ? p.half : 0) + n] = to_bf16(value(output, column));
            } else if (n < limit) {
                y[n] = to_bf16(value(output, column));
            }
#endif
        }
        if (cluster > 1) cluster_barrier();
        else __syncthreads();
    }
}
