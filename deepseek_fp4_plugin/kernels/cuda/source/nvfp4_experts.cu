// Each expert's NVFP4 weights times the rows that chose it, for more than a few tokens.
//
// Work is the groups of 16 outputs of all entries of a list in a row; an entry is some rows of an expert. Teams of warps
// take equal runs of it, whatever was chosen; a team's warps share the inputs. An item is some groups of a run, of one
// entry, that are multiplied by the same activations. A warp has a ring of units, each of up to two slabs of one group and
// one bulk copy, on into its team's next items. What `experts_work` wrote of a block's entries is read once; an entry's rows are found once.
//
// ROWS8: at most so many columns of 8 rows a warp multiplies at a time; `experts_work` says how many.
// GROUPS: of an item, at most.  GATED: gate and up take turns of 8, silu(gate) * up is stored.
// HELD: where not 0, a team is one warp, which has so many tiles of inputs and stores its own sums. It keeps the
// activations from item to item where registers allow.
// RING: slabs of a warp's ring.  WARPS: of a block.  BLOCKS: that a multiprocessor is to hold.
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

constexpr int OUTPUTS = GROUPS * 16, MAX_ENTRIES = 512;  // of a block

struct Team {
    int team, index, lane, lo, hi;  // its warps, this one's place among them; its groups
    u32 ring, barrier, taken;  // taken: barrier of the team's warps that have read the sums
    float* sums;  // [team][OUTPUTS][columns + 1]
    int* places;  // [columns]
    __device__ void meet() const {
        if (team == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + (int)(threadIdx.x >> 5) / team), "r"(32 * team) : "memory");
    }
};

// Some groups of one entry, item by item through a team's run.
struct Item {
    int slot, group, present, left;  // place in the table; its first group, how many; groups from there to the run's end
    __device__ Item(const Team& t, int groups) : slot(t.lo / groups), group(t.lo - slot * groups), left(t.hi - t.lo) {
        present = min(min(GROUPS, left), groups - group);
    }
    __device__ bool next(int groups) {  // whether of another entry
        group += present, left -= present;
        bool other = group == groups;
        if (other) group = 0, slot++;
        present = min(min(GROUPS, left), groups - group);
        return other;
    }
};

template <int COLUMNS>
__device__ void products(const Parameters& p, const Team& t, const int* table) {
    // Slabs of a unit, and their tiles; units of the ring. Sums of an output: one where registers are short.
    constexpr int SPAN = COLUMNS == 1 ? 2 : 1, TILES = 2 * SPAN, STAGES = RING / SPAN, UNIT_BYTES = SPAN * SLAB_BYTES;
    constexpr int SUMS = GROUPS > 2 || COLUMNS > 1 ? 1 : 2, STRIDE = 8 * COLUMNS + 1;
    // Two groups at a time, so that one's decoding fills the other's waits, where the registers suffice.
    constexpr int STEP = HELD ? 1 : 2;
    constexpr bool ONE = COLUMNS <= 2;  // an entry has no more rows than are multiplied at a time
    constexpr bool HOLDS = HELD > 0 && HELD * COLUMNS <= 8;
    int lane = t.lane, g = lane >> 2, quarter = lane & 3;
    int begin = t.index * p.slabs / t.team, count = (t.index + 1) * p.slabs / t.team - begin;
    int spans = (count + SPAN - 1) / SPAN, group_bytes = p.slabs * SLAB_BYTES;

    Item asked(t, p.groups);
    int ask_index = 0, ask_span = 0, ask_chunk = 0, ask_chunks = 0, ask_stage = 0;
    const u8 *item_from = nullptr, *ask_from = nullptr;
    u32 ask_bytes = 0;
    auto enter = [&]() {
        if (asked.left <= 0) return;
        const int* entry = table + 2 * asked.slot;
        item_from = p.tiles + ((u64)entry[0] * p.groups + asked.group) * group_bytes + begin * SLAB_BYTES;
        if (!ONE) ask_chunks = (entry[3] - entry[1] + 8 * COLUMNS - 1) / (8 * COLUMNS);
    };
    auto begin_span = [&]() {
        ask_from = item_from + ask_span * UNIT_BYTES, ask_bytes = min(SPAN, count - ask_span * SPAN) * SLAB_BYTES;
    };
    auto fill = [&]() {
        if (asked.left <= 0) return;
        if (elected()) {
            u32 barrier = t.barrier + 8 * ask_stage;
            barrier_expect(barrier, ask_bytes);
            bulk_copy_once(t.ring + ask_stage * UNIT_BYTES, ask_from, ask_bytes, barrier);
        }
        if (++ask_stage == STAGES) ask_stage = 0;
        ask_from += group_bytes;
        if (++ask_index < asked.present) return;
        ask_index = 0;
        if (++ask_span == spans) {
            ask_span = 0;
            if (ONE || ++ask_chunk == ask_chunks) {
                ask_chunk = 0;
                item_from += asked.present * group_bytes;
                if (asked.next(p.groups)) enter();
            }
        }
        begin_span();
    };
    enter();
    begin_span();
    for (int stage = 0; stage < STAGES; stage++) fill();
#if EARLY
    let_next_kernel_begin();
    wait_for_kernels_before();
#endif

    u32 stage = 0, parity = 0, turn = 0;
    int known = -1, found = -1;  // the entry whose scales are below, the place in `order` whose rows are
    float scale = 0.0f, up_scale = 0.0f;  // one number for each of an expert's parts
    int first = 0, end = 0;               // its rows
    const u16* row[COLUMNS];  // a lane's first activation of each of its rows, and how many lie from it to the last
    int last[COLUMNS], choice[COLUMNS];
    u16* to[COLUMNS][2];  // of a warp alone: outputs of the rows whose sums a lane has
    Quad x[HOLDS ? (HELD + TILES - 1) / TILES * TILES : TILES][COLUMNS][2] = {};
    auto ask = [&](int d, int offset) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            load_quad_if(x[d][c][0], row[c] + offset, offset < last[c]);
            load_quad_if(x[d][c][1], row[c] + offset + 8, offset < last[c]);
        }
    };
    for (Item item(t, p.groups); item.left > 0; item.next(p.groups)) {
        if (item.slot != known) {
            known = item.slot, first = table[2 * known + 1], end = table[2 * known + 3];
            const float* scales = p.row_scale + (u64)table[2 * known] * p.groups * 16;
            scale = HELD ? scales[0] : scales[lane & 15], up_scale = HELD && GATED ? scales[8] : 0.0f;
        }
        int absent = GROUPS - item.present, group = item.group - absent;  // the last ones are there
        for (int row0 = first; row0 < end; row0 += 8 * COLUMNS) {
            if (found != row0) {
                found = row0;
                int input = begin * SLAB_INPUTS + quarter * 16;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    int r = row0 + 8 * c + g;
                    choice[c] = r < end ? load_early(p.order + r) : 0;
                    last[c] = r < end ? min(p.width - input, count * SLAB_INPUTS) : 0;
                    row[c] = p.x + (u64)(choice[c] / p.k) * p.x_stride + input;
                    if (HELD)
#pragma unroll
                        for (int j = 0; j < 2; j++)
                            to[c][j] = p.y + (u64)__shfl_sync(~0u, choice[c], 4 * (2 * quarter + j)) * p.y_stride;
                }
#pragma unroll
                for (int d = 0; d < (HOLDS ? HELD : TILES); d++) {
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) x[d][c][0] = x[d][c][1] = Quad{0, 0, 0, 0};
                    ask(d, d * 64);
                }
            }
            float acc[GROUPS][SUMS][COLUMNS][4] = {};
            auto take = [&]() {  // the ring's next unit
                barrier_wait(t.barrier + 8 * stage, parity);
                u32 unit = t.ring + stage * UNIT_BYTES;
                if (++stage == STAGES) stage = 0, parity ^= 1;
                return unit;
            };
            // Units of one span, group by group. The activations of the next are asked for when the last has used these.
            auto multiply = [&](int at, int slabs, int next) {
#pragma unroll
                for (int i = 0; i < GROUPS; i += STEP) {
                    if (i + STEP <= absent) continue;
                    u32 unit[STEP];
#pragma unroll
                    for (int n = 0; n < STEP; n++) unit[n] = i + n < absent ? 0 : take();
                    if (STEP > 1 && i < absent) unit[0] = unit[STEP - 1];  // its products are not used
                    auto slab = [&](int s) {
#pragma unroll
                        for (int d = 2 * s; d < 2 * s + 2; d++) {
#pragma unroll
                            for (int n = 0; n < STEP; n++) {
                                u32 here = unit[n] + s * SLAB_BYTES;
                                multiply_tile<COLUMNS>(acc[i + n], shared_quad(here + d % 2 * TILE_BYTES + lane * 16),
                                                       shared_word(here + SCALES_OFFSET + lane * 4), d & 1, x[at + d]);
                            }
                            if (!HOLDS && i + STEP == GROUPS) ask(d, next + d * 64);
                        }
                    };
                    slab(0);
                    if (SPAN > 1 && slabs > 1) slab(SPAN - 1);
                    else if (SPAN > 1 && !HOLDS && i + STEP == GROUPS) ask(2, next + 128), ask(3, next + 192);
                    __syncwarp();
                    fill();
                    if (STEP > 1 && i >= absent) fill();
                }
            };
            if constexpr (HOLDS) {
#pragma unroll
                for (int d = 0; d < HELD; d += TILES) multiply(d, (HELD - d + 1) / 2, 0);
            } else {
                for (int slab = 0; slab < count; slab += SPAN) {
                    int next = slab + SPAN < count ? slab + SPAN : 0;  // at last the first ones, for the next item
                    multiply(0, count - slab, next * SLAB_INPUTS);
                }
            }

            auto sum = [&](int i, int c, int n) {
                return acc[i][0][c][n] + (SUMS > 1 ? acc[i][SUMS - 1][c][n] : 0.0f);
            };
#if HELD
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        if (i < absent || row0 + 8 * c + 2 * quarter + j >= end) continue;
                        float upper = sum(i, c, j) * scale;
#if GATED
                        // Rounded where the reference rounds.
                        int n = (group + i) * 8 + g;
                        float gate = round_bf16(silu(round_bf16(upper))), up = round_bf16(sum(i, c, 2 + j) * up_scale);
                        if (n < p.out) to[c][j][n] = to_bf16(gate * up);
#else
                        int n = (group + i) * 16 + g;
                        if (n < p.out) to[c][j][n] = to_bf16(upper);
                        if (n + 8 < p.out) to[c][j][n + 8] = to_bf16(sum(i, c, 2 + j) * scale);
#endif
                    }
#else
            barrier_wait(t.taken, turn ^ 1);  // the sums before have been read
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                float* own = t.sums + ((t.index * GROUPS + i) * 16 + g) * STRIDE + 2 * quarter;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (int n = 0; n < 4; n++) own[(n >> 1) * 8 * STRIDE + 8 * c + (n & 1)] = sum(i, c, n);
            }
            if (t.index == 0 && quarter == 0)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) t.places[8 * c + g] = choice[c];
            t.meet();
            // Warps take turns with 32 outputs of a column, a lane one of them; sums of the team's warps in order.
            int parts = min(end - row0, 8 * COLUMNS) * (GROUPS / 2);
            for (int part = t.index; part < parts; part += t.team) {
                int column = part / (GROUPS / 2), output = part % (GROUPS / 2) * 32 + lane;
                float total = 0.0f;
                for (int w = 0; w < t.team; w++) total += t.sums[(w * OUTPUTS + output) * STRIDE + column];
                total *= scale;
                u16* y = p.y + (u64)t.places[column] * p.y_stride;
                bool there = output >= 16 * absent;
#if GATED
                // Rounded where the reference rounds. Lanes 8 to 15 and 24 to 31 have up.
                float gate = round_bf16(total), up = __shfl_down_sync(~0u, gate, 8);
                int n = group * 8 + (output >> 4) * 8 + (lane & 7);
                if (there && !(lane & 8) && n < p.out) y[n] = to_bf16(round_bf16(silu(gate)) * up);
#else
                int n = group * 16 + output;
                if (there && n < p.out) y[n] = to_bf16(total);
#endif
            }
            barrier_arrive_if(t.taken, true);  // each lane for itself, so that racecheck can follow
            turn ^= 1;
#endif
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    nvfp4_experts(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(8) u64 barriers[WARPS * RING], taken[WARPS];
    __shared__ int table[2 * (MAX_ENTRIES + 1)], places[WARPS * 8 * ROWS8];
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    Team t;
    t.team = p.team, t.index = warp % p.team, t.lane = threadIdx.x & 31;
    t.ring = shared_address(memory) + warp * RING * SLAB_BYTES;
    t.barrier = shared_address(barriers + warp * RING);
    t.taken = shared_address(taken + warp / p.team);
    t.sums = (float*)(memory + WARPS * RING * SLAB_BYTES) + warp / p.team * p.team * OUTPUTS * (8 * ROWS8 + 1);
    t.places = places + warp / p.team * 8 * ROWS8;
    if (t.lane == 0) {
        for (int stage = 0; stage < RING; stage++) barrier_init(t.barrier + 8 * stage, 1);
#if !HELD
        if (t.index == 0) barrier_init(t.taken, 32 * p.team);
#endif
        barrier_fence();
    }
#if !EARLY
    wait_for_kernels_before();
    let_next_kernel_begin();  // only now: the next kernel may then read the work before it waits
#endif
    int groups = load_early(p.work) * p.groups, columns = load_early(p.work + 1), teams = WARPS / p.team;
    int own = (int)blockIdx.x * teams, all = (int)gridDim.x * teams;
    auto begin = [&](int team) { return (int)((u64)groups * team / all); };
    int first = begin(own) / p.groups, entries = (begin(own + teams) - 1) / p.groups + 1 - first;
    for (int i = threadIdx.x; i < 2 * entries + 2; i += 32 * WARPS) table[i] = load_early(p.work + 2 + 2 * first + i);
    __syncthreads();
    own += warp / p.team;
    t.lo = begin(own) - first * p.groups, t.hi = begin(own + 1) - first * p.groups;
    if (columns == 1) products<1>(p, t, table);
    else if (ROWS8 == 2 || columns == 2) products<2>(p, t, table);
    else products<ROWS8>(p, t, table);
}
