// Each expert's NVFP4 weights times the rows that chose it, for more than a few tokens.
//
// Work is a list of items, expert by expert: one expert, some of its groups of outputs. Teams of warps take equal runs
// of it, whatever was chosen; a team's warps share the inputs. A warp has a ring of slabs that bulk copies fill, on
// into its team's next items. What `experts_work` wrote is read once; rows of an expert are found once.
//
// ROWS8: at most so many columns of 8 rows a warp multiplies at a time; fewer where experts have few rows.
// GROUPS: groups of 16 outputs of an item.  GATED: gate and up take turns of 8, silu(gate) * up is stored.
// HELD: of teams of one warp, tiles of activations that stay in registers from item to item.
// STAGES: slabs of the ring.  BLOCKS: that a multiprocessor is to hold.
// EARLY: the kernel before waited for the work, so that weights are asked for before it ends.
#include "nvfp4.cuh"

struct Parameters {
    const u8* tiles;         // [experts][groups][slabs][1152]
    const float* row_scale;  // [experts][groups * 16], in the order of the tiles
    const u16* x;            // [.][x_stride]; choice i takes row i / k
    u16* y;                  // [choices][y_stride]
    const int* order;        // see experts_work.cu
    const int* work;
    int width, x_stride, y_stride;
    int groups, slabs, team, out, k;
};

constexpr int WARPS = 8, OUTPUTS = GROUPS * 16, MAX_EXPERTS = 512;
constexpr int STAGE_BYTES = GROUPS * SLAB_BYTES;

__device__ inline int load_early_int(const int* pointer) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

struct Team {
    int team, index, lane, lo, hi;  // its warps, this one's place among them; its items
    u32 ring, barrier;
    float* sums;  // two sets of [team][OUTPUTS][columns + 1]
    int* places;  // two sets of [columns]
    __device__ void meet() const {
        if (team == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + (int)(threadIdx.x >> 5) / team), "r"(32 * team) : "memory");
    }
};

template <int COLUMNS>
__device__ void products(const Parameters& p, const Team& t, const int* table) {
    constexpr int DEPTH = COLUMNS == 1 ? 4 : 2, STRIDE = 8 * COLUMNS + 1;
    constexpr bool HOLDS = HELD > 0 && COLUMNS == 1;
    int lane = t.lane, g = lane >> 2, quarter = lane & 3;
    int begin = t.index * p.slabs / t.team, count = (t.index + 1) * p.slabs / t.team - begin;
    int sets = (p.groups + GROUPS - 1) / GROUPS;

    int ask_item = t.lo, ask_slab = 0, ask_chunks = 0, ask_present = 0, ask_stage = 0;
    const u8* ask_from = nullptr;
    auto aim = [&]() {
        if (ask_item >= t.hi) return;
        int slot = ask_item / sets, group = (ask_item - slot * sets) * GROUPS;
        ask_from = p.tiles + (((u64)table[2 * slot] * p.groups + group) * p.slabs + begin) * SLAB_BYTES;
        ask_present = min(GROUPS, p.groups - group);
        ask_chunks = (table[2 * slot + 3] - table[2 * slot + 1] + 8 * COLUMNS - 1) / (8 * COLUMNS);
    };
    auto fill = [&]() {
        if (ask_item >= t.hi) return;
        if (lane == 0) {
            u32 at = t.ring + ask_stage * STAGE_BYTES, barrier = t.barrier + 8 * ask_stage;
            barrier_expect(barrier, ask_present * SLAB_BYTES);
            for (int i = 0; i < ask_present; i++)
                bulk_copy(at + i * SLAB_BYTES, ask_from + ((u64)i * p.slabs + ask_slab) * SLAB_BYTES, SLAB_BYTES, barrier);
        }
        if (++ask_stage == STAGES) ask_stage = 0;
        if (++ask_slab == count) {
            ask_slab = 0;
            if (--ask_chunks == 0) ask_item++, aim();
        }
    };
    aim();
    for (int stage = 0; stage < STAGES; stage++) fill();
#if EARLY
    let_next_kernel_begin();
    wait_for_kernels_before();
#endif

    u32 stage = 0, parity = 0;
    float scale = 0.0f;  // of output `lane`: one number for each of an expert's parts
    int turn = 0, known = -1, found = -1;  // the expert of `scale`; the place in `order` whose rows are below
    const u16* row[COLUMNS];   // a lane's first activation of each of its rows, and how many lie from it to the last
    int last[COLUMNS], choice[COLUMNS];
    Quad held[HOLDS ? HELD : 1][1][2] = {};
    for (int item = t.lo; item < t.hi; item++) {
        int slot = item / sets, group = (item - slot * sets) * GROUPS;
        int expert = table[2 * slot], first = table[2 * slot + 1], end = table[2 * slot + 3];
        if (expert != known) known = expert, scale = p.row_scale[(u64)expert * p.groups * 16 + (lane & 15)];
        for (int row0 = first; row0 < end; row0 += 8 * COLUMNS, turn ^= 1) {
            if (found != row0) {
                found = row0;
                int input = begin * SLAB_INPUTS + quarter * 16;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    int r = row0 + 8 * c + g;
                    choice[c] = r < end ? load_early_int(p.order + r) : 0;
                    last[c] = r < end ? min(p.width - input, count * SLAB_INPUTS) : 0;
                    row[c] = p.x + (u64)(choice[c] / p.k) * p.x_stride + input;
                }
                if (HOLDS) {
#pragma unroll
                    for (int d = 0; d < (HOLDS ? HELD : 1); d++) {
                        held[d][0][0] = held[d][0][1] = Quad{0, 0, 0, 0};
                        load_quad_if(held[d][0][0], row[0] + d * 64, d * 64 < last[0]);
                        load_quad_if(held[d][0][1], row[0] + d * 64 + 8, d * 64 < last[0]);
                    }
                }
            }
            float acc[GROUPS][CHAINS<COLUMNS>][COLUMNS][4] = {};
            auto multiply = [&](int d, const Quad (&x)[COLUMNS][2]) {
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    u32 here = t.ring + stage * STAGE_BYTES + i * SLAB_BYTES;
                    multiply_tile<COLUMNS>(acc[i], shared_quad(here + d * TILE_BYTES + lane * 16),
                                           shared_word(here + SCALES_OFFSET + lane * 4), d, x);
                }
            };
            auto used = [&]() {
                __syncwarp();
                fill();
                if (++stage == STAGES) stage = 0, parity ^= 1;
            };
            if constexpr (HOLDS) {
#pragma unroll
                for (int d = 0; d < HELD; d++) {
                    if (d / 2 >= count) break;
                    if (!(d & 1)) barrier_wait(t.barrier + 8 * stage, parity);
                    multiply(d & 1, held[d]);
                    if (d & 1) used();
                }
            } else {
                // Activations are asked for some tiles ahead. Inputs past the width meet zero weights.
                Quad x[DEPTH][COLUMNS][2] = {};
                auto ask = [&](Quad (&to)[COLUMNS][2], int offset) {
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        load_quad_if(to[c][0], row[c] + offset, offset < last[c]);
                        load_quad_if(to[c][1], row[c] + offset + 8, offset < last[c]);
                    }
                };
#pragma unroll
                for (int d = 0; d < DEPTH; d++) ask(x[d], d * 64);
                int offset = DEPTH * 64;
                for (int slab = 0; slab < count; slab += DEPTH / 2) {
#pragma unroll
                    for (int d = 0; d < DEPTH; d++) {
                        if (slab + d / 2 >= count) break;
                        if (!(d & 1)) barrier_wait(t.barrier + 8 * stage, parity);
                        multiply(d & 1, x[d]);
                        if (d & 1) used();
                        ask(x[d], offset);
                        offset += 64;
                    }
                }
            }

            // Sums of the team's warps, in order. Two sets, so that one is added up while the next is multiplied.
            float* here = t.sums + turn * t.team * OUTPUTS * STRIDE;
            int* places = t.places + turn * 8 * COLUMNS;
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                float* own = here + ((t.index * GROUPS + i) * 16 + g) * STRIDE + 2 * quarter;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (int n = 0; n < 4; n++)
                        own[(n >> 1) * 8 * STRIDE + 8 * c + (n & 1)] =
                            acc[i][0][c][n] + (CHAINS<COLUMNS> > 1 ? acc[i][CHAINS<COLUMNS> - 1][c][n] : 0.0f);
            }
            if (t.index == 0 && quarter == 0)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) places[8 * c + g] = choice[c];
            t.meet();
            // A warp takes every so many-th column, a lane an output: 32 of an item, 16 where gated.
            int present = min(end - row0, 8 * COLUMNS);
            for (int column = t.index; column < present; column += t.team) {
                float sum = 0.0f;
                for (int w = 0; w < t.team; w++) sum += here[(w * OUTPUTS + lane) * STRIDE + column];
                sum *= scale;
                u16* y = p.y + (u64)places[column] * p.y_stride;
#if GATED
                // Rounded where the reference rounds. Lanes 8 to 15 and 24 to 31 have up.
                float gate = round_bf16(sum), up = __shfl_down_sync(~0u, gate, 8);
                int n = group * 8 + (lane >> 4) * 8 + (lane & 7);
                if (!(lane & 8) && n < p.out) y[n] = to_bf16(round_bf16(silu(gate)) * up);
#else
                if (group * 16 + lane < p.out) y[group * 16 + lane] = to_bf16(sum);
#endif
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    nvfp4_experts(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(8) u64 barriers[WARPS * STAGES];
    __shared__ int table[2 * (MAX_EXPERTS + 1) + 2], places[WARPS * 2 * 8 * ROWS8];
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    Team t;
    t.team = p.team, t.index = warp % p.team, t.lane = threadIdx.x & 31;
    t.ring = shared_address(memory) + warp * STAGES * STAGE_BYTES;
    t.barrier = shared_address(barriers + warp * STAGES);
    t.sums = (float*)(memory + WARPS * STAGES * STAGE_BYTES) + warp / p.team * p.team * 2 * OUTPUTS * (8 * ROWS8 + 1);
    t.places = places + warp / p.team * 2 * 8 * ROWS8;
    if (t.lane == 0) {
        for (int stage = 0; stage < STAGES; stage++) barrier_init(t.barrier + 8 * stage, 1);
        barrier_fence();
    }
#if !EARLY
    wait_for_kernels_before();
    let_next_kernel_begin();  // only now: the next kernel may then read the work before it waits
#endif
    int active = load_early_int(p.work), rows = load_early_int(p.work + 1);
    for (int i = threadIdx.x; i < 2 * active + 2; i += 32 * WARPS) table[i] = load_early_int(p.work + 2 + i);
    __syncthreads();
    int items = active * ((p.groups + GROUPS - 1) / GROUPS), teams = WARPS / p.team;
    int own = (int)blockIdx.x * teams + warp / p.team, all = (int)gridDim.x * teams;
    t.lo = (int)((u64)items * own / all), t.hi = (int)((u64)items * (own + 1) / all);
    if (ROWS8 == 1 || rows <= 4 * active) products<1>(p, t, table);
    else if (ROWS8 == 2 || rows <= 12 * active) products<(ROWS8 < 2 ? ROWS8 : 2)>(p, t, table);
    else products<ROWS8>(p, t, table);
}
