// One to eight activation rows times NVFP4 weights, dense or of a few tokens' experts: what counts is to read them at the
// memory's rate, and to be done soon after the activations are there.
//
// A block takes one set of outputs after the other; its warps share the inputs, and so do the blocks of a cluster. A lane
// copies its own 16 bytes of a tile, and its own scales, into a ring and reads back only what it copied: nothing is
// exchanged and no barrier is needed. The ring is filled before the kernel that makes the activations has ended, and on
// into the block's next outputs. Sums of warps and blocks have a fixed order.
//
// ROWS8: columns of 8 activation rows.  GROUPS: groups of 16 outputs a warp has.  WARPS: of a block.  STAGES: slabs in a
// warp's ring.  DEPTH: tiles of activations under way.  MIN_BLOCKS: that a multiprocessor holds, of this launch and the next.
// GATED: outputs are gate and up in turns of 8, and silu(gate) * up is what is stored.
// EXPERTS: the second axis of the grid is a choice (token, expert); one row of blocks does eight rows of an expert. Gate and
// up wait for the choices; what follows them does not, since they did.
#include "nvfp4.cuh"

struct Parameters {
    const u8* tiles;         // [groups][slabs][1152]; of EXPERTS [experts] of these
    const float* row_scale;  // [groups * 16], in the order of the tiles
    const u16* x;            // [rows][x_stride]; of EXPERTS choice i takes row i / k
    u16* y;                  // [rows][y_stride]; of EXPERTS [choices][y_stride]
    int rows, width, x_stride, y_stride;
    int groups, slabs;
    int out;   // outputs, both of gate and up
    int half;  // 0, or outputs of gate where gate and up take turns
#if EXPERTS
    const long long* ids;   // [choices], below 0: not here
    int choices, k;         // 64 at most; choices of a row of x
#endif
};

#if EXPERTS
// The choices that took the expert of one of them, a bit each.
__device__ inline u64 choices_of_expert(const Parameters& p, int choice, long long& expert) {
    int lane = threadIdx.x & 31;
    long long low = lane < p.choices ? load_early(p.ids + lane) : -1, high = lane + 32 < p.choices ? load_early(p.ids + lane + 32) : -1;
    expert = __shfl_sync(~0u, choice < 32 ? low : high, choice & 31);
    return __ballot_sync(~0u, low == expert) | (u64)__ballot_sync(~0u, high == expert) << 32;
}
#endif

constexpr int STAGE_BYTES = GROUPS * SLAB_BYTES;
constexpr int OUTPUTS = 16 * GROUPS;
constexpr int STRIDE = 8 * ROWS8 + 1;
constexpr int SUMS = WARPS * OUTPUTS * STRIDE;

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) nvfp4_matvec(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float factors[2][OUTPUTS];
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int cluster = (int)cluster_size(), rank = (int)cluster_rank();
    int parts = WARPS * cluster, part = rank * WARPS + warp;
    int begin = part * p.slabs / parts, count = (part + 1) * p.slabs / parts - begin;
    int block = (int)blockIdx.x / cluster, blocks = (int)gridDim.x / cluster;
    int sets = (p.groups + GROUPS - 1) / GROUPS, items = (sets - block + blocks - 1) / blocks;

    const u8* tiles = p.tiles;
    const float* row_scale = p.row_scale;
    int rows = p.rows;
#if EXPERTS
#if GATED
    wait_for_kernels_before();
    let_next_kernel_begin();  // only now: the next kernel may then read the choices before it waits
#endif
    int choice = (int)blockIdx.y;
    long long expert;
    u64 same = choices_of_expert(p, choice, expert), later = same >> choice;
    if (expert < 0 || __popcll(same ^ later << choice) % 8) {  // earlier choices have it
        wait_for_kernels_before();
        return;
    }
    rows = min(8, __popcll(later));
    tiles += (u64)expert * p.groups * p.slabs * SLAB_BYTES, row_scale += expert * p.groups * 16;
    auto place = [&](int row) {
        u64 left = later;
        for (; row > 0; row--) left &= left - 1;
        return choice + __ffsll((long long)left) - 1;
    };
    auto source = [&](int row) { return row < rows ? place(row) / p.k : 0; };
#else
    auto place = [](int row) { return row; };
    auto source = place;
#endif

    // Two sets of sums, so that one is added up while the next is multiplied.
    float* sums = (float*)memory;
    u32 ring = (shared_address(sums + 2 * SUMS) + 127) / 128 * 128 + warp * STAGES * STAGE_BYTES + lane * 16;
    u64 group_bytes = (u64)p.slabs * SLAB_BYTES;
    const u8* from = tiles + (u64)block * GROUPS * group_bytes + (u64)begin * SLAB_BYTES + lane * 16;
    u64 next_set = (u64)blocks * GROUPS * group_bytes - (u64)count * SLAB_BYTES;
    int left = items * count, ask_slab = 0, ask_group = block * GROUPS;
    auto fill = [&](u32 to) {
        if (left > 0) {
            left--;
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                bool present = GROUPS == 1 || ask_group + i < p.groups;
                const u8* at = present ? from + i * group_bytes : tiles;
                copy_quad_once(to + i * SLAB_BYTES, at, present);
                copy_quad_once(to + i * SLAB_BYTES + TILE_BYTES, at + TILE_BYTES, present);
                copy_word_once(to + i * SLAB_BYTES + SCALES_OFFSET - lane * 12, at + SCALES_OFFSET - lane * 12, present);
            }
            from += SLAB_BYTES;
            if (++ask_slab == count) ask_slab = 0, ask_group += blocks * GROUPS, from += next_set;
        }
        copies_commit();
    };
    for (int stage = 0; stage < STAGES; stage++) fill(ring + stage * STAGE_BYTES);
#if !EXPERTS || !GATED
    let_next_kernel_begin();
    wait_for_kernels_before();
#endif

    const u16* row[ROWS8];  // a lane's first activation of each of its rows, and how many lie from it to the last
    int last[ROWS8], input = begin * SLAB_INPUTS + quarter * 16;
#pragma unroll
    for (int c = 0; c < ROWS8; c++) {
        int r = 8 * c + g;
        last[c] = r < rows ? min(p.width - input, count * SLAB_INPUTS) : 0;
        row[c] = p.x + (u64)source(r) * p.x_stride + input;
    }
    u32 at = ring, end = ring + STAGES * STAGE_BYTES;
    int turn = 0;
    for (int item = 0; item < items; item++, turn ^= 1) {
        int first_group = (block + item * blocks) * GROUPS;
        float factor = 0.0f;
        if ((int)threadIdx.x < OUTPUTS && first_group * 16 + (int)threadIdx.x < p.groups * 16)
            factor = load_float(row_scale + first_group * 16 + threadIdx.x);
        float acc[GROUPS][CHAINS<ROWS8>][ROWS8][4] = {};
        // Activations are asked for some tiles ahead: their way from the second cache is longer than a tile's products.
        // Inputs past the width meet zero weights, so that they may be any finite numbers.
        Quad x[DEPTH][ROWS8][2] = {};
        const u16* from_row[ROWS8];
        int inside[ROWS8];
        auto ask = [&](int d) {
#pragma unroll
            for (int c = 0; c < ROWS8; c++) {
                load_quad_if(x[d][c][0], from_row[c] + d * 64, d * 64 < inside[c]);
                load_quad_if(x[d][c][1], from_row[c] + d * 64 + 8, d * 64 < inside[c]);
            }
        };
#pragma unroll
        for (int c = 0; c < ROWS8; c++) from_row[c] = row[c], inside[c] = last[c];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) ask(d);
        for (int slab = 0; slab < count; slab += DEPTH / 2) {
#pragma unroll
            for (int c = 0; c < ROWS8; c++) from_row[c] += DEPTH * 64, inside[c] -= DEPTH * 64;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (d && !(d & 1) && slab + d / 2 >= count) break;
                if (!(d & 1)) copies_wait<STAGES - 1>();
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    u32 here = at + i * SLAB_BYTES;
                    Quad codes = shared_quad(here + (d & 1) * TILE_BYTES);
                    u32 scales = shared_word(here + SCALES_OFFSET - lane * 12);
                    multiply_tile<ROWS8>(acc[i], codes, scales, d & 1, x[d]);
                }
                ask(d);
                if (d & 1) {
                    fill(at);
                    at += STAGE_BYTES;
                    if (at == end) at = ring;
                }
            }
        }

        // Sums of the warps, then of the cluster's blocks.
        float* here = sums + turn * SUMS;
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int c = 0; c < ROWS8; c++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    here[(warp * OUTPUTS + 16 * i + 8 * (n >> 1) + g) * STRIDE + 8 * c + 2 * quarter + (n & 1)] =
                        acc[i][0][c][n] + (CHAINS<ROWS8> > 1 ? acc[i][CHAINS<ROWS8> - 1][c][n] : 0.0f);
        if ((int)threadIdx.x < OUTPUTS) factors[turn][threadIdx.x] = factor;
        __syncthreads();
        auto own = [&](int output, int column) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += here[(w * OUTPUTS + output) * STRIDE + column];
            return sum;
        };
        if (cluster > 1) {
            for (int i = threadIdx.x; i < OUTPUTS * rows; i += 32 * WARPS) {
                float sum = own(i % OUTPUTS, i / OUTPUTS);
                here[i % OUTPUTS * STRIDE + i / OUTPUTS] = sum;
            }
            cluster_barrier();
        }
        auto value = [&](int output, int column) {
            float sum = 0.0f;
            if (cluster > 1)
                for (int r = 0; r < cluster; r++) sum += cluster_float(shared_address(here + output * STRIDE + column), r);
            else
                sum = own(output, column);
            return sum * factors[turn][output];
        };
        constexpr int STORED = GATED ? OUTPUTS / 2 : OUTPUTS;
        for (int i = threadIdx.x + rank * 32 * WARPS; i < STORED * rows; i += 32 * WARPS * cluster) {
            int output = i % STORED, column = i / STORED;
            if (first_group + output / (GATED ? 8 : 16) >= p.groups) continue;
            u16* y = p.y + (u64)place(column) * p.y_stride;
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
    }
    if (cluster > 1) cluster_barrier();  // others may still read this block's sums
}
