// Many activation rows times NVFP4 weights: Hopper's matrix unit with weights, decoded in registers, as its left operand.
//
// A block has 64 outputs of each warpgroup, once or twice, by ROWS activation rows; the blocks of a cluster share the
// inputs. A warp of its own has slabs of weights and activations copied into a ring. A warp's group of 16 outputs lies in
// the tiles as the matrix unit wants it; a product's 16 inputs are four of each of a tile's four blocks (nvfp4.cuh). So
// `arrange` puts activations in that order once, and where a block's copies and the matrix unit want them. While the
// matrix unit works on one piece, the next is decoded.
//
// ROWS: 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 136, 144, 152, 160, 168, 176, 192, 208 or 256.  OUTS: 1 or 2 times 64 outputs.
// WARPS: that multiply.  STAGES: slabs in the ring.
// GATED: outputs are gate and up in turns of 8, and silu(gate) * up is what is stored.
// EVEN: as many blocks as there are multiprocessors. While there are two products (a block of outputs by a block of rows) for
// each, a block takes one in turn; the slabs of the rest they share evenly, from the last one down. So a block first
// multiplies the lower slabs of a product whose upper ones are a later block's, and leaves the sums in memory; then a whole
// product; at last the upper slabs of one, to which it adds what earlier blocks have left. It waits for earlier ones alone,
// which do that first.
#include "nvfp4.cuh"
#include "wgmma.cuh"

WGMMA(bf16, 24, N12, S12, 12, 13, 14, 15, 16)
WGMMA(bf16, 40, N20, S20, 20, 21, 22, 23, 24)
WGMMA(bf16, 48, N24, S24, 24, 25, 26, 27, 28)
WGMMA(bf16, 56, N28, S28, 28, 29, 30, 31, 32)
WGMMA(bf16, 80, N40, S40, 40, 41, 42, 43, 44)
WGMMA(bf16, 136, N68, S68, 68, 69, 70, 71, 72)
WGMMA(bf16, 152, N76, S76, 76, 77, 78, 79, 80)
WGMMA(bf16, 168, N84, S84, 84, 85, 86, 87, 88)
WGMMA(bf16, 176, N88, S88, 88, 89, 90, 91, 92)
WGMMA(bf16, 192, N96, S96, 96, 97, 98, 99, 100)
WGMMA(bf16, 208, N104, S104, 104, 105, 106, 107, 108)
WGMMA(bf16, 256, N128, S128, 128, 129, 130, 131, 132)

constexpr int HALF_BYTES = ROWS * 128;  // 64 inputs of a block's activation rows

struct ArrangeParameters {
    const u16* x;  // [rows][x_stride]
    u8* arranged;  // [row blocks][slabs][2 halves][ROWS][128 bytes]
    int* ready;    // EVEN: [blocks], set to 0
    int rows, width, x_stride, slabs, blocks;
};

// Word 8 i + 2 j + h of a row's 64 inputs goes to word 8 j + 4 h + i, 16-byte pieces of row r to their place XOR r % 8. A
// warp has a slab of ARRANGED rows, which are asked for together: lane 16 half + 4 i + j has both h; zeros past the width and
// the rows.
constexpr int ARRANGERS = 8, ARRANGED = 4;  // warps, and rows of each, eight apart

extern "C" __global__ void __launch_bounds__(32 * ARRANGERS) arrange(const __grid_constant__ ArrangeParameters p) {
    static_assert(ARRANGERS == 8, "a warp's rows have the same place among eight");
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, i = lane >> 2 & 3, j = lane & 3;
    int first = (int)blockIdx.y * (ARRANGERS * ARRANGED) + warp, input = (int)blockIdx.x * SLAB_INPUTS + lane * 4;
    int all_rows = (p.rows + ROWS - 1) / ROWS * ROWS;
    u8* to = p.arranged + (u64)blockIdx.x * (2 * HALF_BYTES) + (lane >> 4) * HALF_BYTES;
    to += (2 * j + (i & 1) ^ warp) * 16 + (i >> 1) * 8;
    let_next_kernel_begin();
    wait_for_kernels_before();
#if EVEN
    if (blockIdx.x == 0 && blockIdx.y == 0)
        for (int block = threadIdx.x; block < p.blocks; block += 32 * ARRANGERS) p.ready[block] = 0;
#endif
    uint2 words[ARRANGED] = {};
#pragma unroll
    for (int k = 0; k < ARRANGED; k++) {
        int row = first + k * ARRANGERS;
        if (row < p.rows && input < p.width) words[k] = *(const uint2*)(p.x + (u64)row * p.x_stride + input);
    }
#pragma unroll
    for (int k = 0; k < ARRANGED; k++) {
        int row = first + k * ARRANGERS;
        // Of two lanes, i even and odd, one stores both words of h = 0, the other of h = 1.
        uint2 pair = swapped(words[k].x, words[k].y, i & 1, 4);
        if (row < all_rows) *(uint2*)(to + (u64)(row / ROWS) * p.slabs * (2 * HALF_BYTES) + row % ROWS * 128) = pair;
    }
}

struct Parameters {
    const u8* tiles;         // [groups][slabs][1152]
    const float* row_scale;  // [groups * 16], in the order of the tiles
    const u8* x;             // as `arrange` leaves them
    u16* y;                  // [rows][y_stride]
    float* parts;            // EVEN: [blocks][sums of a block], as its threads have them
    int* ready;              // EVEN: [blocks], whether a block has left its part
    int rows, y_stride;
    int groups, slabs, row_blocks;
    int out;   // outputs, both of gate and up
    int half;  // 0, or outputs of gate where gate and up take turns
    int band;  // blocks of rows that go along the outputs together
};

constexpr int GROUPS = WARPS * OUTS;
// Registers move from the warpgroup that copies to those that multiply, within what a block is launched with.
constexpr int THREADS = 32 * WARPS + 128, COPIER_REGISTERS = 32;
constexpr int LAUNCHED = 65536 / MIN_BLOCKS / THREADS / 8 * 8;
constexpr int SHARE = (LAUNCHED * THREADS - 128 * COPIER_REGISTERS) / (32 * WARPS) / 8 * 8;
constexpr int REGISTERS = SHARE < 240 ? SHARE : 240;

__device__ inline void multipliers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

// What a block multiplies, product by product: `count` slabs of one from `begin` on.
struct Walk {
    int whole;      // EVEN: the next product that is the block's alone
    int low, high;  // of the slabs of the others in a row, what is left
    int row_block, first_group, begin, count;
    // Products that are one block's.
    __device__ static int alone(const Parameters& p) {
        int products = (p.groups + GROUPS - 1) / GROUPS * p.row_blocks;
        return max(0, products / (int)gridDim.x - 1) * (int)gridDim.x;
    }
    // Of the slabs that are shared those before block `block`.
    __device__ static int before(const Parameters& p, int block) {
        int products = (p.groups + GROUPS - 1) / GROUPS * p.row_blocks - alone(p);
        return (int)((u64)products * p.slabs * block / gridDim.x);
    }
    __device__ explicit Walk(const Parameters& p) : whole((int)blockIdx.x) {
#if EVEN
        low = before(p, (int)blockIdx.x), high = before(p, (int)blockIdx.x + 1);
#else
        int cluster = (int)cluster_size(), rank = (int)cluster_rank();
        low = rank * p.slabs / cluster, high = (rank + 1) * p.slabs / cluster;
#endif
    }
    __device__ bool next(const Parameters& p) {  // whether there is one more
        int out_blocks = (p.groups + GROUPS - 1) / GROUPS;
#if EVEN
        int product = whole, others = alone(p);
        if (whole < others) {
            whole += (int)gridDim.x, begin = 0, count = p.slabs;
        } else {
            if (high <= low) return false;
            product = (high - 1) / p.slabs;
            int from = max(low, product * p.slabs);
            begin = from - product * p.slabs, count = high - from, high = from, product += others;
        }
#else
        if (high <= low) return false;
        int product = (int)blockIdx.y * out_blocks + (int)blockIdx.x / (int)cluster_size();
        begin = low, count = high - low, high = low;
#endif
        // Blocks that run at once may be of a few blocks of rows: weights that one of them reads serve the others from the cache.
        int band = product / (p.band * out_blocks) * p.band, in_band = min(p.band, p.row_blocks - band);
        product -= band * out_blocks;
        row_block = band + product % in_band, first_group = product / in_band * GROUPS;
        return true;
    }
    __device__ bool leaves(const Parameters& p) const { return EVEN && begin + count < p.slabs; }
};

// One warp's work: the ring's slabs, in order.
__device__ inline void copy(const Parameters& p, Walk walk, u64* full, u64* empty, u32 stored, u32 activations, u32 weights) {
    int lane = threadIdx.x & 31, present = 0;
    const u8 *tiles = nullptr, *x = nullptr;
    auto enter = [&]() {
        present = min(GROUPS, p.groups - walk.first_group);
        tiles = p.tiles + ((u64)(walk.first_group + lane) * p.slabs + walk.begin) * SLAB_BYTES;
        x = p.x + ((u64)walk.row_block * p.slabs + walk.begin) * (2 * HALF_BYTES);
    };
    auto ask_weights = [&](int slab, u32 slot) {
        u32 barrier = shared_address(full + slot);
        if (lane == 0) barrier_expect(barrier, 2 * HALF_BYTES + present * SLAB_BYTES);
        __syncwarp();
        if (lane < present)
            bulk_copy(weights + (slot * GROUPS + lane) * SLAB_BYTES, tiles + (u64)slab * SLAB_BYTES, SLAB_BYTES, barrier);
    };
    auto ask_activations = [&](int slab, u32 slot) {
        if (lane == 0)
            bulk_copy(activations + slot * 2 * HALF_BYTES, x + (u64)slab * (2 * HALF_BYTES), 2 * HALF_BYTES,
                      shared_address(full + slot));
    };
    bool there = walk.next(p);
    if (there) enter();
    int first = there ? min(walk.count, STAGES) : 0;
    for (int slab = 0; slab < first; slab++) ask_weights(slab, slab);
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int slab = 0; slab < first; slab++) ask_activations(slab, slab);
    u32 slot = first % STAGES, turn = first / STAGES, products = 0;  // turn: how often the slot has been used
    while (there) {
        for (int slab = first; slab < walk.count; slab++) {
            if (turn) barrier_wait(shared_address(empty + slot), turn - 1 & 1);
            ask_weights(slab, slot);
            ask_activations(slab, slot);
            if (++slot == STAGES) slot = 0, turn++;
        }
        first = 0;
        bool stores = !walk.leaves(p);
        there = walk.next(p);
        if (!there) break;
        if (stores) barrier_wait(stored, products++ & 1);  // the sums lie in the ring's place
        enter();
    }
}

// A thread's sums to memory, or those of an earlier block to its own.
constexpr int SUMS = OUTS * ROWS / 2;

__device__ inline float4* part_of(const Parameters& p, int block) {
    return (float4*)(p.parts + (u64)block * (SUMS * 32 * WARPS)) + threadIdx.x;
}

__device__ inline void leave(const Parameters& p, const float (&sums)[OUTS][ROWS / 2]) {
    float4* to = part_of(p, (int)blockIdx.x);
#pragma unroll
    for (int m = 0; m < OUTS; m++)
#pragma unroll
        for (int i = 0; i < ROWS / 2; i += 4)
            to[(m * (ROWS / 2) + i) / 4 * (32 * WARPS)] = float4{sums[m][i], sums[m][i + 1], sums[m][i + 2], sums[m][i + 3]};
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    multipliers_barrier();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.ready + blockIdx.x) : "memory");
}

// left: slabs of the product that lie before this block's.
__device__ inline void take(const Parameters& p, int left, float (&sums)[OUTS][ROWS / 2]) {
    for (int block = (int)blockIdx.x - 1; left > 0; block--) {
        int slabs = Walk::before(p, block + 1) - Walk::before(p, block);
        if (!slabs) continue;
        left -= slabs;
        u32 ready = 0;
        if ((threadIdx.x & 31) == 0)
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(p.ready + block) : "memory");
            while (!ready);
        __syncwarp();
        const float4* from = part_of(p, block);
#pragma unroll
        for (int m = 0; m < OUTS; m++)
#pragma unroll
            for (int i = 0; i < ROWS / 2; i += 4) {
                float4 part = from[(m * (ROWS / 2) + i) / 4 * (32 * WARPS)];
                sums[m][i] += part.x, sums[m][i + 1] += part.y, sums[m][i + 2] += part.z, sums[m][i + 3] += part.w;
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) nvfp4_wgmma(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 full[STAGES], empty[STAGES], stored;
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
    int cluster = (int)cluster_size(), rank = (int)cluster_rank();
    Walk walk(p);
    u32 activations = (shared_address(memory) + 1023) / 1024 * 1024, weights = activations + STAGES * 2 * HALF_BYTES;
    constexpr int OUTPUTS = 16 * GROUPS, STRIDE = OUTPUTS + 4, RUN = GATED ? 16 : 8;
    float* all = (float*)(memory + (activations - shared_address(memory)));  // the sums, in the ring's place

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared_address(full + stage), 1);
            barrier_init(shared_address(empty + stage), 32 * WARPS);
        }
        barrier_init(shared_address(&stored), 32 * WARPS);
        barrier_fence();
    }
    __syncthreads();

    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPIER_REGISTERS));
        if (warp == WARPS) copy(p, walk, full, empty, shared_address(&stored), activations, weights);
        __syncwarp();
        if (cluster > 1) cluster_barrier(), cluster_barrier();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        // A warpgroup's warps have neighbouring groups: of m64 tile m warp w has group 4 OUTS (w / 4) + 4 m + w % 4.
        int own = (warp >> 2) * (4 * OUTS) + (warp & 3);
        u32 slot = 0, parity = 0;
        while (walk.next(p)) {
            float factor[OUTS][2], sums[OUTS][ROWS / 2] = {};
#pragma unroll
            for (int m = 0; m < OUTS; m++) {
                const float* row_scale = p.row_scale + min(walk.first_group + own + 4 * m, p.groups - 1) * 16 + (lane >> 2);
                factor[m][0] = row_scale[0], factor[m][1] = row_scale[8];
            }
            u32 a[2][4][4], last = 0;
            for (int slab = 0; slab < walk.count; slab++) {
                barrier_wait(shared_address(full + slot), parity);
#pragma unroll
                for (int index = 0; index < 2 * OUTS; index++) {
                    int tile = index / OUTS, m = index % OUTS;
                    u32 here = weights + (slot * GROUPS + own + 4 * m) * SLAB_BYTES;
                    decode_tile(a[index & 1], here + tile * TILE_BYTES + lane * 16, here + SCALES_OFFSET + lane * 4, tile);
                    u64 b = swizzled_rows(activations + (slot * 2 + tile) * HALF_BYTES);
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < 4; step++) wgmma_bf16(sums[m], a[index & 1][step], b + 2 * step);
                    wgmma_commit();
                    wgmma_wait<1>();  // what was decoded before this piece is free again, and behind a slab's first the slab before
                    if (index == 0) {
                        __syncwarp();
                        barrier_arrive_if(shared_address(empty + last), slab > 0);  // each lane for itself, so that racecheck can follow
                    }
                }
                last = slot;
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            wgmma_wait<0>();
#if EVEN
            __syncwarp();
            barrier_arrive_if(shared_address(empty + last), true);
            if (walk.leaves(p)) {
                leave(p, sums);
                continue;
            }
            if (walk.begin > 0) take(p, walk.begin, sums);
#endif
            multipliers_barrier();  // nobody reads the ring any more
#pragma unroll
            for (int m = 0; m < OUTS; m++)
#pragma unroll
                for (int i = 0; i < ROWS / 2; i++) {
                    int column = i / 4 * 8 + 2 * (lane & 3) + (i & 1), output = (own + 4 * m) * 16 + (i >> 1 & 1) * 8 + (lane >> 2);
                    all[column * STRIDE + output] = sums[m][i] * factor[m][i >> 1 & 1];
                }

            // Sums of the cluster's blocks; 8 outputs that lie together are stored at once.
            if (cluster > 1) cluster_barrier();
            else multipliers_barrier();
            int first_row = walk.row_block * ROWS, present = min(ROWS, p.rows - first_row), runs = OUTPUTS / RUN;
#pragma unroll 2
            for (int i = threadIdx.x + rank * 32 * WARPS; i < present * runs; i += 32 * WARPS * cluster) {
                int row = i / runs, output = i % runs * RUN, group = walk.first_group + output / 16;
                if (group >= p.groups) continue;
                float v[RUN];
                const float* from = all + row * STRIDE + output;
#pragma unroll
                for (int q = 0; q < RUN; q += 4) {
                    float4 sum = *(const float4*)(from + q);
                    if (cluster > 1) {
                        sum = cluster_floats(shared_address(from + q), 0);
                        for (int r = 1; r < cluster; r++) {
                            float4 other = cluster_floats(shared_address(from + q), r);
                            sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                        }
                    }
                    v[q] = sum.x, v[q + 1] = sum.y, v[q + 2] = sum.z, v[q + 3] = sum.w;
                }
                int upper = output & 8, n = group * 16 + upper, limit = p.out;
                if (p.half) n = group * 8, limit = p.half;
#if GATED
#pragma unroll
                for (int k = 0; k < 8; k++) v[k] = round_bf16(silu(round_bf16(v[k]))) * round_bf16(v[k + 8]);
#endif
                u16* y = p.y + (u64)(first_row + row) * p.y_stride + n + (p.half && upper && !GATED ? p.half : 0);
                if (n + 8 <= limit && (u64)y % 16 == 0) {
                    *(Quad*)y = Quad{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
                } else {
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        if (n + k < limit) y[k] = to_bf16(v[k]);
                }
            }
#if EVEN
            shared_fence();  // copies come where the sums were
            barrier_arrive_if(shared_address(&stored), true);
#endif
        }
        if (cluster > 1) cluster_barrier();
    }
}
