// Each expert's NVFP4 weights times the rows that chose it, for many rows: Hopper's matrix unit, as in nvfp4_wgmma.cu.
//
// Rows lie in the order of experts, cut into blocks of one expert each (experts_work.cu). `arrange_rows` gathers them once
// in the order of inputs and pieces that the matrix unit wants. A block of threads has OUTS * 128 outputs of one block of rows
// after the other, and as many columns as those rows need; warps of their own copy on into the next while sums are
// stored. Gated, hidden values are stored as the second product wants to read them.
//
// ROWS: of a block of rows, at most.  FIRST, FIRST + STEP, ... ROWS: columns that there is code for.
// STAGES: slabs in the ring.  MIN_BLOCKS: that a multiprocessor holds.
// OUTS: times 64 outputs of a warpgroup, of which there are two; launches of a product may differ.
// GATED: outputs are gate and up in turns of 8, and silu(gate) * up is what is stored.
// FP8: both sides are E4M3. `round_rows` takes the place of `arrange_rows`; hidden values are BF16 rows for it to round.
// GATHERS: the first product's rows are gathered by the warps that copy, of tokens that `arrange_tokens` put in order: less to
// do for few rows; for many the copies of single pieces cost more than rows that lie together save.
// ONLY: of these numbers of columns the one that this launch is for, or 0. Code for more than three, or of more than 128
// columns, takes more registers than there are: products would be serialized. So each has a launch of its own, the largest
// first, which begins as multiprocessors become free. Few rows, which are gathered, have one launch in which each tile asks
// how many columns there are.
#include "fp8.cuh"
#include "nvfp4.cuh"
#include "wgmma.cuh"

#if FP8
#define multiply wgmma_e4m3
WGMMA(e4m3, 64, N32, S32, 32, 33, 34, 35, 36)
WGMMA(e4m3, 96, N48, S48, 48, 49, 50, 51, 52)
WGMMA(e4m3, 128, N64, S64, 64, 65, 66, 67, 68)
WGMMA(e4m3, 160, N80, S80, 80, 81, 82, 83, 84)
WGMMA(e4m3, 192, N96, S96, 96, 97, 98, 99, 100)
WGMMA(e4m3, 224, N112, S112, 112, 113, 114, 115, 116)
WGMMA(e4m3, 256, N128, S128, 128, 129, 130, 131, 132)
#else
#define multiply wgmma_bf16
WGMMA(bf16, 24, N12, S12, 12, 13, 14, 15, 16)
WGMMA(bf16, 40, N20, S20, 20, 21, 22, 23, 24)
WGMMA(bf16, 48, N24, S24, 24, 25, 26, 27, 28)
WGMMA(bf16, 56, N28, S28, 28, 29, 30, 31, 32)
WGMMA(bf16, 80, N40, S40, 40, 41, 42, 43, 44)
WGMMA(bf16, 176, N88, S88, 88, 89, 90, 91, 92)
WGMMA(bf16, 192, N96, S96, 96, 97, 98, 99, 100)
WGMMA(bf16, 208, N104, S104, 104, 105, 106, 107, 108)
#endif

constexpr int INPUT_BYTES = FP8 ? 128 : 256;  // of a row's slab

struct Rows {  // a block of rows
    int expert, first, count, unused;  // places first, ... of `order`
};

// What the first launch after the sorting has waited for, later ones read before they wait: not from the first cache.
constexpr int SIZES = 8;  // see experts_work.cu

struct Work {
    const int* blocks;  // where those of each size end; then `Rows` each
    __device__ int count() const { return load_early(blocks + SIZES - 1); }
    __device__ int begin() const { return ONLY > FIRST ? load_early(blocks + (ONLY - FIRST) / STEP - 1) : 0; }
    __device__ int end() const { return ONLY ? load_early(blocks + (ONLY - FIRST) / STEP) : count(); }
    __device__ Rows operator[](int i) const {
        const int* at = blocks + SIZES + 4 * i;
        return Rows{load_early(at), load_early(at + 1), load_early(at + 2), 0};
    }
};

// Columns that the matrix unit multiplies for so many rows.
__device__ inline int columns_of(int rows) { return rows <= FIRST ? FIRST : FIRST + (rows - FIRST + STEP - 1) / STEP * STEP; }

// Where word `word` of a row's 64 inputs lies among its 128 bytes; see nvfp4_wgmma.cu.
__device__ inline int place_of(int word, int row) {
    int piece = (word >> 1 & 3) * 2 + (word & 1);
    return (piece ^ (row & 7)) * 16 + (word >> 3) * 4;
}

struct RowsParameters {
    const u16* x;      // [tokens][x_stride]; choice i takes row i / k
    u8* arranged;      // [blocks of rows][slabs][2 halves][columns][128 bytes], ROWS * 256 bytes for each slab of a block
    const int* order;  // see experts_work.cu
    const int* blocks;
    int width, x_stride, slabs, k;
};

constexpr int TOGETHER = 5;  // rows that a warp asks for at once

// Slabs of blocks of rows, a warp every sixteenth row, as `arrange` in nvfp4_wgmma.cu; zeros past the width and the rows. The
// last blocks, which launches by columns multiply first, are written last, so that the second cache has them. A block of
// threads has two neighbouring slabs where there are many, so that it asks less often which rows they are.
extern "C" __global__ void __launch_bounds__(512, 3) arrange_rows(const __grid_constant__ RowsParameters p) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = lane >> 4, i = lane >> 2 & 3, j = lane & 3;
    int place = (2 * j + (i & 1) ^ warp & 7) * 16 + (i >> 1) * 8;  // of the row's 128 bytes
    wait_for_kernels_before();
    let_next_kernel_begin();
    Work work{p.blocks};
    int items = work.count() * p.slabs, run = items < 16 * (int)gridDim.x ? 1 : 2;
    int block = -1, columns = 0, token = -1;  // lane n has the token of the warp's n-th row
    for (int item = (int)blockIdx.x * run; item < items;) {
        if (item / p.slabs != block) {
            block = item / p.slabs;
            Rows rows = work[block];
            int own = warp + 16 * lane;
            columns = columns_of(rows.count);
            token = own < rows.count ? load_early(p.order + rows.first + own) / p.k : -1;
        }
        int slab = item - block * p.slabs, input = slab * SLAB_INPUTS + lane * 4;
        u8* to = p.arranged + ((u64)block * p.slabs * ROWS + (u64)slab * columns) * 256 + half * columns * 128 + place;
        for (int first = 0; warp + 16 * first < columns; first += TOGETHER) {
            uint2 words[TOGETHER] = {};
#pragma unroll
            for (int n = 0; n < TOGETHER; n++) {
                int from = __shfl_sync(~0u, token, first + n);
                if (from >= 0 && input < p.width) words[n] = *(const uint2*)(p.x + (u64)from * p.x_stride + input);
            }
#pragma unroll
            for (int n = 0; n < TOGETHER; n++) {
                int row = warp + 16 * (first + n);
                uint2 pair = swapped(words[n].x, words[n].y, i & 1, 4);
                if (row < columns) *(uint2*)(to + row * 128) = pair;
            }
        }
        if (++item % run == 0) item += ((int)gridDim.x - 1) * run;
    }
}

struct TokensParameters {
    const u16* x;          // [tokens][x_stride]
    const long long* ids;  // [tokens][k], below 0: not here
    u8* arranged;          // [tokens][slabs][2 halves][128 bytes]
    int width, x_stride, slabs, k;
};

constexpr int ARRANGERS = 8, SLABS = 7;  // warps, and slabs that each asks for at once

// A token a block, a warp some slabs of it; zeros past the width. What no expert here was chosen for stays as it was.
extern "C" __global__ void __launch_bounds__(32 * ARRANGERS) arrange_tokens(const __grid_constant__ TokensParameters p) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = lane >> 4, i = lane >> 2 & 3, j = lane & 3, token = blockIdx.x;
    int place = half * 128 + (2 * j + (i & 1)) * 16 + (i >> 1) * 8;  // of a slab's bytes, where two lanes' words are swapped
    const u16* x = p.x + (u64)token * p.x_stride;
    u8* to = p.arranged + (u64)token * p.slabs * 256 + place;
    let_next_kernel_begin();
    wait_for_kernels_before();
    bool here = false;
    for (int choice = lane; choice < p.k; choice += 32) here |= p.ids[(u64)token * p.k + choice] >= 0;
    if (!__any_sync(~0u, here)) return;
    for (int first = warp; first < p.slabs; first += ARRANGERS * SLABS) {
        uint2 words[SLABS] = {};
#pragma unroll
        for (int n = 0; n < SLABS; n++) {
            int input = (first + n * ARRANGERS) * SLAB_INPUTS + lane * 4;
            if (input < p.width) words[n] = *(const uint2*)(x + input);
        }
#pragma unroll
        for (int n = 0; n < SLABS; n++) {
            int slab = first + n * ARRANGERS;
            uint2 pair = swapped(words[n].x, words[n].y, i & 1, 4);
            if (slab < p.slabs) *(uint2*)(to + slab * 256) = pair;
        }
    }
}

struct RoundParameters {
    const u16* x;      // [rows][x_stride]
    u8* rounded;       // [blocks of rows][slabs][columns][128 bytes], ROWS * 128 bytes for each slab of a block
    float* scale;      // of each row, in the order of experts
    const int* order;  // choice i takes row i / k; null: rows are in the order of experts
    const int* blocks;
    int width, x_stride, slabs, k;
};

// The rows as E4M3, a block of threads one; zeros past the width and the rows. A product's 32 inputs are eight of each of a
// tile's four blocks (nvfp4.cuh): word 4 i + 2 j + h of a row's 64 inputs goes to word 8 j + 4 h + i.
constexpr int ROUNDERS = 4;  // warps

extern "C" __global__ void __launch_bounds__(32 * ROUNDERS) round_rows(const __grid_constant__ RoundParameters p) {
    __shared__ u32 of_warps[2][ROUNDERS];  // in turns
    int turn = 0;
    wait_for_kernels_before();
    let_next_kernel_begin();
    Work work{p.blocks};
    int items = work.count() * ROWS;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        int block = item / ROWS, row = item - block * ROWS;
        Rows rows = work[block];
        int columns = columns_of(rows.count), place = rows.first + row, width = row < rows.count ? p.width : 0;
        if (row >= columns) continue;
        const u16* x = p.x + (u64)(!width ? 0 : p.order ? p.order[place] / p.k : place) * p.x_stride;
        RowScale scale = row_scale(x, width, of_warps[turn ^= 1]);
        if (threadIdx.x == 0 && width) p.scale[place] = scale.scale;
        u8* to = p.rounded + ((u64)block * p.slabs * ROWS + row) * 128;
        for (int i = (int)threadIdx.x * 8; i < p.slabs * SLAB_INPUTS; i += 32 * ROUNDERS * 8) {
            Quad q = i < width ? load_quad(x + i) : Quad{0, 0, 0, 0};
            int piece = (i >> 6 & 1) * 4 + (i >> 3 & 1) * 2, at = i >> 4 & 3;
            u8* slab = to + (u64)(i / SLAB_INPUTS) * columns * 128 + at * 4;
            *(u32*)(slab + (piece ^ (row & 7)) * 16) = to_fp8(q.x, q.y, scale.inverse);
            *(u32*)(slab + ((piece + 1) ^ (row & 7)) * 16) = to_fp8(q.z, q.w, scale.inverse);
        }
    }
}

struct Parameters {
    const u8* tiles;         // [experts][groups][slabs][1152]
    const float* row_scale;  // [experts][groups * 16], in the order of the tiles
    const u8* x;             // as `arrange_rows`, `arrange_tokens`, `round_rows` or a gated product leaves them
    u8* y;                   // gated: hidden values where `arrange_rows` would leave them, else BF16 [choices][out]
    const int* order;
    const int* blocks;
    const float* x_scale;  // as `round_rows` leaves them
    int groups, slabs;
    int out;   // outputs, not gated
    int half;  // hidden values of a row, gated; FP8: y is BF16 rows of them in the order of experts
    int k;     // choice i takes token i / k, gated
};

constexpr int WARPS = 8, GROUPS = WARPS * OUTS;  // 8 or 16: a slab of hidden values has 16 groups of gate and up
static_assert(!GATHERS || !FP8 && ROWS <= 128, "a lane for each of a warp's rows");
constexpr bool GATHERED = GATHERS && GATED;  // rows are those of tokens; else a block's lie as the matrix unit reads them
constexpr int COPIERS = GATHERED ? 4 : 1, ARRIVALS = GATHERED ? 1 + 32 * COPIERS : 1;  // warps, and what fills a slab
constexpr int THREADS = 32 * WARPS + 128, COPIER_REGISTERS = 32;
// Registers move from the warpgroup that copies to those that multiply, within what a block is launched with.
constexpr int LAUNCHED = 65536 / MIN_BLOCKS / THREADS / 8 * 8;
constexpr int SHARE = (LAUNCHED * THREADS - 128 * COPIER_REGISTERS) / (32 * WARPS) / 8 * 8;
constexpr int REGISTERS = SHARE < 240 ? SHARE : 240;
constexpr int MOST = ONLY ? ONLY : ROWS;  // columns
constexpr int WEIGHTS_AT = MOST * INPUT_BYTES, STAGE_BYTES = WEIGHTS_AT + GROUPS * SLAB_BYTES;  // a slab of the ring

struct Ring {
    u32 memory, barriers, slot, parity;  // for each slab of the ring whether it is full, then whether it is empty
    __device__ u32 full() const { return barriers + 8 * slot; }
    __device__ u32 empty() const { return barriers + 8 * (STAGES + slot); }
    __device__ u32 at() const { return memory + slot * STAGE_BYTES; }
    __device__ void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// Sets of outputs of a block of rows; gated, they end with a whole slab of hidden values, filled up with zeros.
__device__ inline int sets_of(const Parameters& p) {
    static_assert(GROUPS == 8 || GROUPS == 16, "a slab of hidden values is one set or two");
    return GATED && !FP8 ? (p.groups + 15) / 16 * (16 / GROUPS) : (p.groups + GROUPS - 1) / GROUPS;
}

// The ring's slabs, in order, by COPIERS warps. Gathered, a half-warp has every eighth row of a block, of which a lane copies
// one piece of 16 bytes: each time to the same place XOR row % 8.
__device__ inline void copy(const Parameters& p, Ring ring, int copier) {
    int lane = threadIdx.x & 31, sets = sets_of(p), filled = 0;
    int row = 2 * copier + (lane >> 4), place = row * 128 + ((lane & 7) ^ row) * 16;
    Work work{p.blocks};
    ring.parity = 1;  // the first turn finds every slab free
    int end = work.end() * sets;
    for (int item = work.begin() * sets + blockIdx.x; item < end; item += gridDim.x) {
        int block = item / sets, first_group = (item - block * sets) * GROUPS;
        int present = max(0, min(GROUPS, p.groups - first_group));
        Rows rows = work[block];
        int columns = ONLY ? ONLY : columns_of(rows.count);
        u32 bytes = GATHERED ? 0 : columns * INPUT_BYTES;
        const u8* tiles = p.tiles + ((u64)rows.expert * p.groups + first_group + lane) * p.slabs * SLAB_BYTES;
        const u8* x = p.x + (GATHERED ? (lane & 15) * 16 : (u64)block * p.slabs * ROWS * INPUT_BYTES);
        // Where the token of the warp's lane-th row lies; what is filled up is the block's last row.
        int own = min((lane >> 1) * 8 + 2 * copier + (lane & 1), rows.count - 1);
        u32 token = GATHERED ? (u32)(load_early(p.order + rows.first + own) / p.k) * p.slabs * 256 : 0;
        for (int slab = 0; slab < p.slabs; slab++, filled++) {
            if (filled >= STAGES) barrier_wait(ring.empty(), ring.parity);
            if (copier == 0) {
                if (lane == 0) {
                    barrier_expect(ring.full(), bytes + present * SLAB_BYTES);
                    if (!GATHERED) bulk_copy(ring.at(), x + (u64)slab * bytes, bytes, ring.full());
                }
                __syncwarp();
                if (lane < present)
                    bulk_copy(ring.at() + WEIGHTS_AT + lane * SLAB_BYTES, tiles + (u64)slab * SLAB_BYTES, SLAB_BYTES, ring.full());
            }
            if (GATHERED) {
                u32 to = ring.at() + (lane >> 3 & 1) * columns * 128 + place;
#pragma unroll
                for (int n = 0; n < MOST / 8; n++) {
                    u32 at = __shfl_sync(~0u, token, 2 * n + (lane >> 4)) + slab * 256;
                    if (8 * n < columns) copy_quad(to + n * 1024, x + at, true);
                }
                copies_arrive(ring.full());
            }
            ring.next();
        }
    }
    if (GATHERED) copies_wait_all();
}

// 8 x 8 values of 16 bits, two of a row a lane: rows become columns.
__device__ inline u32 transposed(u32 bits) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(bits));
    return result;
}

constexpr int STEPS = FP8 ? 2 : 4;  // products of a tile

// Of FROM, FROM + STEP, ... TO columns so many: their sums are the first of a thread's.
template <int FROM, int TO, int SUMS>
__device__ inline void multiply_columns(int columns, float (&sums)[SUMS], const u32 (&a)[STEPS][4], u64 b) {
    if constexpr (FROM == TO) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++) multiply((float(&)[TO / 2])sums, a[step], b + 2 * step);
        wgmma_commit();
    } else {
        constexpr int MIDDLE = FROM + (TO - FROM) / STEP / 2 * STEP;
        if (columns <= MIDDLE) multiply_columns<FROM, MIDDLE>(columns, sums, a, b);
        else multiply_columns<MIDDLE + STEP, TO>(columns, sums, a, b);
    }
}

// OUTS * 128 outputs of one block of rows, filled up to FROM, FROM + STEP, ... or TO columns.
template <int FROM, int TO>
__device__ inline void products(const Parameters& p, Ring& ring, const Rows& rows, int block, int first_group) {
    // A warpgroup's warps have neighbouring groups: of m64 tile m warp w has group 4 OUTS (w / 4) + 4 m + w % 4.
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, own = (warp >> 2) * (4 * OUTS) + (warp & 3);
    int columns = FROM == TO ? TO : columns_of(rows.count);
    float sums[OUTS][TO / 2] = {};
    u32 a[2][STEPS][4], before = 0;
    // What the end needs is asked for here: an expert has one scale, or one of gate and one of up.
    const float* scales = p.row_scale + (u64)rows.expert * p.groups * 16;
    constexpr float MADE_UP = FP8 ? 0x1p-9f : 1.0f;  // see decode_tile_fp8
    float factor[2] = {load_float(scales) * MADE_UP, load_float(scales + 8) * MADE_UP};
#if !GATED
    int places[(TO + 31) / 32];  // of row 32 i + lane
#pragma unroll
    for (int i = 0; i < (TO + 31) / 32; i++)
        places[i] = 32 * i + lane < rows.count ? load_early(p.order + rows.first + 32 * i + lane) : -1;
#endif
    for (int slab = 0; slab < p.slabs; slab++) {
        barrier_wait(ring.full(), ring.parity);
        if (GATHERED) shared_fence();
#pragma unroll
        for (int index = 0; index < 2 * OUTS; index++) {
            int tile = index / OUTS, m = index % OUTS;
            u32 here = ring.at() + WEIGHTS_AT + (own + 4 * m) * SLAB_BYTES;
#if FP8
            decode_tile_fp8(a[index & 1], here + tile * TILE_BYTES + lane * 16, here + SCALES_OFFSET + lane * 4, tile);
            u64 b = swizzled_rows(ring.at()) + 4 * tile;
#else
            decode_tile(a[index & 1], here + tile * TILE_BYTES + lane * 16, here + SCALES_OFFSET + lane * 4, tile);
            u64 b = swizzled_rows(ring.at() + tile * columns * 128);
#endif
            multiply_columns<FROM, TO>(columns, sums[m], a[index & 1], b);
            wgmma_wait<1>();  // what was decoded before this piece is free again, and behind a slab's first the slab before
            if (index == 0) {
                __syncwarp();
                barrier_arrive_if(before, slab > 0);  // each lane for itself, so that racecheck can follow
            }
        }
        before = ring.empty();
        ring.next();
    }
    wgmma_wait<0>();
    __syncwarp();
    barrier_arrive_if(before, true);

    int quarter = lane & 3;
    auto scale_of = [&](int row) { return !FP8 ? 1.0f : row < rows.count ? load_early(p.x_scale + rows.first + row) : 0.0f; };
#pragma unroll
    for (int m = 0; m < OUTS; m++) {
        int group = first_group + own + 4 * m;
#if GATED
        // Eight hidden values of each row; 64 of them are a row's 128 bytes. Zeros for outputs that are filled up; rows that
        // are may be anything, and their outputs are not stored.
        u16* rows_at = (u16*)p.y + (u64)rows.first * p.half + group * 8 + 2 * quarter;
        u8* to = p.y + (u64)block * ((p.groups + 15) / 16) * ROWS * 256 + (u64)(group >> 3) * columns * 128;
#pragma unroll
        for (int c = 0; c < TO / 8; c++) {
            if (8 * c >= columns) break;
            float h[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float scale = scale_of(8 * c + 2 * quarter + i), gate = sums[m][4 * c + i], up = sums[m][4 * c + 2 + i];
                h[i] = round_bf16(silu(round_bf16(gate * factor[0] * scale))) * round_bf16(up * factor[1] * scale);
            }
            u32 word = transposed(group < p.groups ? pack_bf16(h[0], h[1]) : 0);
            int row = 8 * c + (lane >> 2);
            if (!FP8) *(u32*)(to + row * 128 + place_of((group & 7) * 4 + quarter, row)) = word;
            else if (group < p.groups && row < rows.count) *(u32*)(rows_at + row * p.half) = word;
        }
#else
        // Of two lanes one stores four of the first eight outputs, the other four of the rest: 32 bytes of a row at once.
        int upper = quarter & 1, output = group * 16 + 8 * upper + 2 * (quarter & 2);
        u16* to = (u16*)p.y + output;
#pragma unroll
        for (int c = 0; c < TO / 8; c++) {
            if (8 * c >= columns) break;
            int place = __shfl_sync(~0u, places[c / 4], 8 * (c % 4) + (lane >> 2));
            float scale[2] = {scale_of(8 * c + 2 * quarter), scale_of(8 * c + 2 * quarter + 1)};
            u32 words[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* sum = &sums[m][4 * c + 2 * half];
                words[half] = transposed(pack_bf16(sum[0] * factor[half] * scale[0], sum[1] * factor[half] * scale[1]));
            }
            uint2 pair = swapped(words[0], words[1], upper, 1);
            if (place >= 0 && output < p.out) *(uint2*)(to + (u64)place * p.out) = pair;
        }
#endif
    }
}

static_assert((ROWS - FIRST) % STEP == 0 && !(GATHERS && ONLY), "columns end with a block's rows");

template <int COLUMNS>
__device__ inline void by_columns(const Parameters& p, Ring& ring, const Rows& rows, int columns, int block, int first_group) {
    if constexpr (GATHERS) products<COLUMNS, MOST>(p, ring, rows, block, first_group);
    else if (COLUMNS == MOST || columns == COLUMNS) products<COLUMNS, COLUMNS>(p, ring, rows, block, first_group);
    else by_columns<COLUMNS == MOST ? COLUMNS : COLUMNS + STEP>(p, ring, rows, columns, block, first_group);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) nvfp4_experts_wgmma(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    Ring ring{(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers), 0, 0};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared_address(barriers + stage), ARRIVALS);
            barrier_init(shared_address(barriers + STAGES + stage), 32 * WARPS);
        }
        barrier_fence();
    }
    __syncthreads();
    if (!ONLY || ONLY == ROWS) wait_for_kernels_before();
    let_next_kernel_begin();
    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPIER_REGISTERS));
        if (warp < WARPS + COPIERS) copy(p, ring, COPIERS == 1 ? 0 : warp - WARPS);
        if (ONLY && ONLY < ROWS) wait_for_kernels_before();  // who waits for this launch waits for those of other columns, too
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    int sets = sets_of(p);
    Work work{p.blocks};
    int end = work.end() * sets;
    for (int item = work.begin() * sets + blockIdx.x; item < end; item += gridDim.x) {
        int block = item / sets, first_group = (item - block * sets) * GROUPS;
        Rows rows = work[block];
        by_columns<ONLY ? ONLY : FIRST>(p, ring, rows, columns_of(rows.count), block, first_group);
    }
}
