// Few activation rows times BF16 or FP8 weights as they lie in the checkpoint, row by row: what counts is to read them at the
// memory's rate.
//
// A warp has 16 or 32 outputs and a part of the inputs; its weights are the tensor core's left operand. The order of
// inputs within a product is free as long as both sides agree, so a lane copies 16 bytes of an output at a time into a ring
// of its own and reads back only what it copied: nothing is exchanged, and only its own copies are waited for. The ring
// is filled before the kernel that makes the activations has ended, and on into the block's next outputs. Sums of warps,
// and of a cluster's blocks, are added in a fixed order.
//
// ROWS8: columns of 8 activation rows.  GROUPS: groups of 16 outputs a warp has.  STAGES: of 128 bytes a row.
// AHEAD: stages whose activations are under way. What the ring holds when they come is multiplied as fast as they do.
// PACE: stages of a ring under way at once before the kernel ahead has ended, so that what it reads need not queue behind
// them; 0: all.
// FP8: weights are E4M3 with FP32 scales of blocks.
// NORM: activations are the RMSNorm of what is read, which every block makes of whole rows and keeps in shared memory.
#include "device.cuh"

struct Parameters {
    const u8* weights;    // [out][width]
    const float* scales;  // of FP8 [out / block_rows][scale_stride]
    const u16* x;         // [rows][x_stride]
    u16* y;               // [rows][y_stride]
    int rows, width, x_stride, y_stride, out;
    int block_rows, scale_stride;
    int block_shift;  // inputs of a block are 2^block_shift, 64 at least
    float eps;
    const u16* norm;          // [width], the norm's weight
    const u8* other_weights;  // [other_out][width], BF16: a second product of the same rows, or none
    u16* other_y;             // [rows][other_out]
    int other_out;
};

constexpr int VALUES = FP8 ? 16 : 8;  // of 16 bytes
constexpr int ROW_BYTES = 128;        // of an output in a stage: two steps of 64
constexpr int PARTS = 2 * GROUPS;     // outputs that a lane has
constexpr int STAGE_BYTES = PARTS * 2 * 512;
constexpr int STRIDE = 8 * ROWS8 + 1;
constexpr int X_QUADS = FP8 ? 2 : 1;

// Two E4M3 values of a word as BF16: sign, exponent and mantissa go where BF16 has them, which leaves the values off by
// 2^120; subnormal ones too.
__device__ inline u32 pair(u32 word, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "r"(selector));
    return multiply_bf16((bytes & 0x80008000) | ((bytes >> 4) & 0x07F007F0), 0x7B807B80);
}

__device__ inline u32 word(const Quad& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// Rows normed, rounded as `rms_norm` does: [rows] of `stride` bytes from shared address `to` on. Weights are asked for
// before the rows are there; `parts` has room for a float a row and warp.
__device__ inline void norm_rows(const Parameters& p, u32 to, int stride, float* parts) {
    constexpr int HELD = 2;
    int warps = (int)blockDim.x >> 5, warp = (int)threadIdx.x >> 5, quads = p.width / 8;
    Quad held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = (int)(threadIdx.x + i * blockDim.x);
        held[i] = at < quads ? load_weights(p.norm + 8 * at) : Quad{0, 0, 0, 0};
    }
    let_next_kernel_begin();
    wait_for_kernels_before();
    for (int row = 0; row < p.rows; row++) {
        float sum = 0.0f;
        for (int at = threadIdx.x; at < quads; at += blockDim.x) {
            Quad q = load_quad(p.x + (u64)row * p.x_stride + 8 * at);
            store_shared(to + row * stride + 16 * at, q);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float low = from_bf16((u16)word(q, n)), high = from_bf16((u16)(word(q, n) >> 16));
                sum += low * low + high * high;
            }
        }
#pragma unroll
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (!(threadIdx.x & 31)) parts[row * warps + warp] = sum;
    }
    __syncthreads();
    for (int row = 0; row < p.rows; row++) {
        float sum = 0.0f;
        for (int w = 0; w < warps; w++) sum += parts[row * warps + w];
        float factor = rsqrtf(sum / p.width + p.eps);
        auto norm = [&](int at, Quad w) {
            Quad q = shared_quad(to + row * stride + 16 * at);
            u32 out[4];
#pragma unroll
            for (int n = 0; n < 4; n++)
                out[n] = pack_bf16(round_bf16(from_bf16((u16)word(q, n)) * factor) * from_bf16((u16)word(w, n)),
                                   round_bf16(from_bf16((u16)(word(q, n) >> 16)) * factor) * from_bf16((u16)(word(w, n) >> 16)));
            store_shared(to + row * stride + 16 * at, Quad{out[0], out[1], out[2], out[3]});
        };
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int at = (int)(threadIdx.x + i * blockDim.x);
            if (at < quads) norm(at, held[i]);
        }
        for (int at = (int)(threadIdx.x + HELD * blockDim.x); at < quads; at += blockDim.x)
            norm(at, load_weights(p.norm + 8 * at));
    }
    __syncthreads();
}

// The weights of 64 bytes of each output times a lane's activations.
__device__ inline void multiply(float (&sums)[ROWS8][4], Quad upper, Quad lower, const Quad (&x)[ROWS8][X_QUADS]) {
#pragma unroll
    for (int step = 0; step < (FP8 ? 4 : 2); step++) {
        u32 a[4];
        if (FP8) {
            a[0] = pair(word(upper, step), 0x1404), a[1] = pair(word(lower, step), 0x1404);
            a[2] = pair(word(upper, step), 0x3424), a[3] = pair(word(lower, step), 0x3424);
        } else {
            a[0] = word(upper, 2 * step), a[1] = word(lower, 2 * step);
            a[2] = word(upper, 2 * step + 1), a[3] = word(lower, 2 * step + 1);
        }
#pragma unroll
        for (int c = 0; c < ROWS8; c++)
            mma(sums[c], a, word(x[c][step / 2], step % 2 * 2), word(x[c][step / 2], step % 2 * 2 + 1));
    }
}

extern "C" __global__ void __launch_bounds__(512) dense_linear(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int warps = (int)blockDim.x >> 5, cluster = (int)cluster_size(), rank = (int)cluster_rank();
    int row_bytes = p.width * (16 / VALUES), stages = (row_bytes + ROW_BYTES - 1) / ROW_BYTES;
    int parts = warps * cluster, part = rank * warps + warp;
    int begin = part * stages / parts, count = (part + 1) * stages / parts - begin;
    int own_sets = (p.out + 16 * GROUPS - 1) / (16 * GROUPS);
    int sets = own_sets + (p.other_out + 16 * GROUPS - 1) / (16 * GROUPS);
    int block = (int)blockIdx.x / cluster;
    int blocks = (int)gridDim.x / cluster, items = (sets - block + blocks - 1) / blocks;

    float* sums = (float*)memory;  // two sets, so that one is added up while the next is multiplied
    int sums_size = warps * 16 * GROUPS * STRIDE;
    u32 ring = (shared_address(sums + 2 * sums_size) + 127) / 128 * 128 + warp * STAGES * STAGE_BYTES + lane * 16;
    int ask_item = 0, ask_stage = 0;
    u32 ask_slot = 0;
    const u8* from[PARTS];
    auto aim = [&]() {
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int set = block + ask_item * blocks;
            bool other = set >= own_sets;
            int row = min((other ? set - own_sets : set) * 16 * GROUPS + 8 * i + g, (other ? p.other_out : p.out) - 1);
            from[i] = (other ? p.other_weights : p.weights) + (u64)row * row_bytes + (u64)begin * ROW_BYTES + quarter * 16;
        }
    };
    auto fill = [&]() {
        if (ask_item < items && count > 0) {
            int at = (begin + ask_stage) * ROW_BYTES + quarter * 16;
            u32 to = ring + ask_slot * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    bool inside = at + step * 64 < row_bytes;
                    copy_quad_once(to + (2 * i + step) * 512, inside ? from[i] + step * 64 : p.weights, inside);
                }
                from[i] += ROW_BYTES;
            }
            if (++ask_slot == STAGES) ask_slot = 0;
            if (++ask_stage == count) ask_stage = 0, ask_item++, aim();
        }
        copies_commit();
    };
    aim();
    for (int stage = 0; stage < STAGES; stage++) {
        fill();
        if (PACE) copies_wait<PACE ? PACE - 1 : 0>();
    }
    int normed_stride = p.width * 2 + 64;  // two rows meet different banks
    u32 normed = ring + ((warps - warp) * STAGES * STAGE_BYTES - lane * 16);
    if (NORM) {
        norm_rows(p, normed, normed_stride, sums);
    } else {
        let_next_kernel_begin();
        wait_for_kernels_before();
    }

    const u16* row[ROWS8];  // of columns without a row the last row's values: they are never stored
#pragma unroll
    for (int c = 0; c < ROWS8; c++)
        row[c] = p.x + (u64)min(8 * c + g, p.rows - 1) * p.x_stride + begin * (4 * 2 * VALUES) + quarter * VALUES;
    u32 slot = 0;
    int turn = 0;
    for (int item = 0; item < items; item++, turn ^= 1) {
        int set = block + item * blocks;
        bool other = set >= own_sets;
        int first = (other ? set - own_sets : set) * 16 * GROUPS, out = other ? p.other_out : p.out;
        u16* y = other ? p.other_y : p.y;
        int y_stride = other ? p.other_out : p.y_stride;
        float acc[GROUPS][ROWS8][4] = {};
        Quad x[2 * AHEAD][ROWS8][X_QUADS];
        float scale[2 * AHEAD][PARTS];
        const float* scales[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            scales[i] = FP8 ? p.scales + (u64)(min(first + 8 * i + g, p.out - 1) / p.block_rows) * p.scale_stride : nullptr;
        auto ask = [&](int to, int step) {  // activations, and of FP8 the scales, of one of a stage's two steps
            int input = begin * (8 * VALUES) + step * (4 * VALUES) + quarter * VALUES;
            bool inside = step < 2 * count && input < p.width;
#pragma unroll
            for (int c = 0; c < ROWS8; c++)
#pragma unroll
                for (int q = 0; q < X_QUADS; q++) {
                    x[to][c][q] = Quad{0, 0, 0, 0};
                    if (!NORM) load_quad_if(x[to][c][q], row[c] + step * (4 * VALUES) + 8 * q, inside);
                    else if (inside)
                        x[to][c][q] = shared_quad(normed + min(8 * c + g, p.rows - 1) * normed_stride + 2 * (input + 8 * q));
                }
            if (FP8) {
                int first_input = min(begin * (8 * VALUES) + step * (4 * VALUES), p.width - 1);  // one block's are a step's
#pragma unroll
                for (int i = 0; i < PARTS; i++) scale[to][i] = load_float(scales[i] + (first_input >> p.block_shift));
            }
        };
#pragma unroll
        for (int step = 0; step < 2 * AHEAD; step++) ask(step, step);
        for (int first_stage = 0; first_stage < count; first_stage += AHEAD) {
#pragma unroll
            for (int ahead = 0; ahead < AHEAD; ahead++) {
                int stage = first_stage + ahead;
                if (stage >= count) break;
                copies_wait<STAGES - 1>();
                u32 here = ring + slot * STAGE_BYTES;
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    int own_x = 2 * ahead + step;
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) {
                        Quad upper = shared_quad(here + (4 * i + step) * 512);
                        Quad lower = shared_quad(here + (4 * i + 2 + step) * 512);
                        if (FP8) {
                            float own[ROWS8][4] = {};
                            multiply(own, upper, lower, x[own_x]);
#pragma unroll
                            for (int c = 0; c < ROWS8; c++)
#pragma unroll
                                for (int n = 0; n < 4; n++) acc[i][c][n] += own[c][n] * scale[own_x][2 * i + (n >> 1)];
                        } else {
                            multiply(acc[i], upper, lower, x[own_x]);
                        }
                    }
                    ask(own_x, 2 * (stage + AHEAD) + step);
                }
                fill();
                if (++slot == STAGES) slot = 0;
            }
        }

        float* here = sums + turn * sums_size;
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int c = 0; c < ROWS8; c++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    here[(warp * 16 * GROUPS + 16 * i + 8 * (n >> 1) + g) * STRIDE + 8 * c + 2 * quarter + (n & 1)] =
                        acc[i][c][n];
        __syncthreads();
        auto own = [&](int output, int column) {
            float sum = 0.0f;
            for (int w = 0; w < warps; w++) sum += here[(w * 16 * GROUPS + output) * STRIDE + column];
            return sum;
        };
        int values = 16 * GROUPS * p.rows;
        if (cluster > 1) {
            for (int i = threadIdx.x; i < values; i += blockDim.x) {
                int output = i % (16 * GROUPS), column = i / (16 * GROUPS);
                here[output * STRIDE + column] = own(output, column);
            }
            cluster_barrier();
        }
        for (int i = threadIdx.x + rank * blockDim.x; i < values; i += blockDim.x * cluster) {
            int output = i % (16 * GROUPS), column = i / (16 * GROUPS);
            if (first + output >= out) continue;
            float sum = 0.0f;
            if (cluster > 1)
                for (int r = 0; r < cluster; r++) sum += cluster_float(shared_address(here + output * STRIDE + column), r);
            else
                sum = own(output, column);
            y[(u64)column * y_stride + first + output] = to_bf16(sum);
        }
    }
    if (cluster > 1) cluster_barrier();  // others may still read this block's sums
}
