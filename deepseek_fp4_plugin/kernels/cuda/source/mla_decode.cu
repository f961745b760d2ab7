// Absorbed latent attention of a few query rows of each request over the paged cache.
//
// Rows (query, head) of one request are the rows of a matrix; a block has 16 * TILES of them and a part of the context, 64
// cached entries at a time: rows of shared memory that bulk copies fill two chunks ahead. Entries are read once and serve
// as keys and, their latent part, as values. Each warp scores 8 entries, then has a part of the value columns. The
// parts of a context are merged by a cluster in its own memory, and those of several clusters by `mla_merge`; in their order.
//
// LATENT, ROPE: widths.  TILES.  FP8: entries are E4M3, else BF16.  CLUSTER: blocks whose parts are merged at once.
#include "mla.cuh"

constexpr int STEPS = WIDTH / 16, CHUNK = 64, WARPS = 8, COLUMNS = LATENT / WARPS;
constexpr int STRIDE = WIDTH * 2 + 16;  // bytes of a row in shared memory: rows 16 bytes apart modulo 128 meet no bank twice
constexpr int ENTRY = FP8 ? WIDTH : WIDTH * 2, RAW_STRIDE = FP8 ? WIDTH + 16 : STRIDE, SCORES = CHUNK + 4;
constexpr int PART = LATENT + 8;  // values of a row of a part where a cluster merges it
static_assert(16 * TILES * PART * 4 <= 2 * CHUNK * RAW_STRIDE, "a part lies where entries were");

extern "C" __global__ void __launch_bounds__(32 * WARPS) mla_decode(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(8) u64 barriers[2];
    u8* queries = memory;
    u8* raw = queries + 16 * TILES * STRIDE;
    u8* decoded = raw + 2 * CHUNK * RAW_STRIDE;
    float* scores = (float*)(decoded + (FP8 ? CHUNK * STRIDE : 0));
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
    int split = (int)blockIdx.x, request = (int)blockIdx.z, first_row = (int)blockIdx.y * 16 * TILES;
    u32 barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1), barrier_init(barrier + 8, 1);
        barrier_fence();
    }
    __syncthreads();
    let_next_kernel_begin();

    // A norm lies between a step's beginning and here, and lets nothing begin before its own wait is over: lengths, tables
    // and the entries of earlier steps are there, whatever the kernels just before still do.
    int start = (int)load_early(p.starts + request), length = (int)load_early(p.starts + request + 1) - start;
    int context = (int)load_early(p.contexts + request);
    int rows = min(16 * TILES, length * p.heads - first_row);
    if (rows <= 0) {
        wait_for_kernels_before();  // or what waits for this one would not wait for those
        return;
    }
    int chunks = (context + CHUNK - 1) / CHUNK;
    int begin = (int)((long long)split * chunks / p.splits), end = (int)((long long)(split + 1) * chunks / p.splits);
    long long row_offset = (long long)start * p.heads + first_row;  // of the first row in all outputs
    if (CLUSTER == 1 && begin == end) {
        wait_for_kernels_before();
        if ((int)threadIdx.x < rows) p.sums[(long long)split * p.rows + row_offset + threadIdx.x] = NOTHING;
        return;
    }

    int fresh = context - length;  // entries from here on are written by the kernels before
    auto fetch = [&](int chunk, int stage, bool of_fresh) {
        int i = threadIdx.x, token = chunk * CHUNK + i, present = min(CHUNK, context - chunk * CHUNK);
        if (i >= CHUNK) return;
        u32 to = shared_address(raw + (stage * CHUNK + i) * RAW_STRIDE);
        if (i == 0 && of_fresh) barrier_expect(barrier + 8 * stage, present * ENTRY);
        if (i < present) {
            if ((token >= fresh) != of_fresh) return;
            long long page = load_early(p.tables + (long long)request * p.table_stride + token / p.block_size);
            bulk_copy(to, p.cache + (page * p.block_size + token % p.block_size) * ENTRY, ENTRY, barrier + 8 * stage);
        } else if (of_fresh) {  // nothing reads past the context; what lies there may be NaN
            for (int at = 0; at < ENTRY; at += 16)
                asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(to + at), "r"(0) : "memory");
        }
    };
    if (begin < end) fetch(begin, 0, false);
    if (begin + 1 < end) fetch(begin + 1, 1, false);
    wait_for_kernels_before();
    if (begin < end) fetch(begin, 0, true);
    if (begin + 1 < end) fetch(begin + 1, 1, true);
    fresh = 0;
    for (int i = threadIdx.x; i < 16 * TILES * (WIDTH / 8); i += 32 * WARPS) {
        int row = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8, token = start + (first_row + row) / p.heads;
        int head = (first_row + row) % p.heads;
        const u16* from = column < LATENT ? p.q_latent + (long long)token * p.latent_token + head * p.latent_head + column
                                          : p.q_rope + (long long)token * p.rope_token + head * p.rope_head + column - LATENT;
        copy_quad(shared_address(queries + row * STRIDE + column * 2), row < rows ? from : p.q_latent, row < rows);
    }
    copies_commit();  // all on their way together
    int limit[TILES][2];  // entries that a lane's rows see
    float largest[TILES][2], total[TILES][2] = {}, acc[TILES][COLUMNS / 8][4] = {};
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            limit[t][half] = context - length + (first_row + t * 16 + half * 8 + g) / p.heads + 1;
            largest[t][half] = NOTHING;
        }
    copies_wait<0>();
    __syncthreads();

    for (int chunk = begin; chunk < end; chunk++) {
        int stage = (chunk - begin) & 1;
        barrier_wait(barrier + 8 * stage, ((chunk - begin) >> 1) & 1);
        u8* entries = raw + stage * CHUNK * RAW_STRIDE;
#if FP8
        for (int i = threadIdx.x; i < CHUNK * (WIDTH / 16); i += 32 * WARPS) {
            int row = i / (WIDTH / 16), column = i % (WIDTH / 16) * 16;
            Quad q = *(Quad*)(entries + row * RAW_STRIDE + column), low, high;
            decode_fp8(q.x, low.x, low.y), decode_fp8(q.y, low.z, low.w);
            decode_fp8(q.z, high.x, high.y), decode_fp8(q.w, high.z, high.w);
            Quad* to = (Quad*)(decoded + row * STRIDE + column * 2);
            to[0] = low, to[1] = high;
        }
        entries = decoded;
        __syncthreads();
#endif
        // Scores of a warp's 8 entries.
        float* here = scores + stage * 16 * TILES * SCORES;
        float s[TILES][2][4] = {};
        u32 keys = shared_address(entries + (warp * 8 + (lane & 7)) * STRIDE + (lane >> 3) * 16);
        u32 rows_at = shared_address(queries + (lane & 15) * STRIDE + (lane >> 4) * 16);
#pragma unroll 6
        for (int step = 0; step < STEPS; step += 2) {
            u32 b[4];
            load_matrices(b, keys + step * 32);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                u32 a[4];
                load_matrices(a, rows_at + t * 16 * STRIDE + step * 32);
                mma(s[t][0], a, b[0], b[1]);
                load_matrices(a, rows_at + t * 16 * STRIDE + step * 32 + 32);
                mma(s[t][1], a, b[2], b[3]);
            }
        }
        int token = chunk * CHUNK + warp * 8 + 2 * quarter;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                bool seen = token + (n & 1) < limit[t][n >> 1];
                here[(t * 16 + (n >> 1) * 8 + g) * SCORES + warp * 8 + 2 * quarter + (n & 1)] =
                    seen ? (s[t][0][n] + s[t][1][n]) * p.scale : NOTHING;
            }
        __syncthreads();

        // Every warp makes the same probabilities, and adds up its own columns.
        u32 values = shared_address(entries + (lane & 15) * STRIDE + (warp * COLUMNS + (lane >> 4) * 8) * 2);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float x[4][2][2][2];  // 16 entries, row half, entry half, pair
            float most[2] = {largest[t][0], largest[t][1]};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int side = 0; side < 2; side++)
#pragma unroll
                        for (int n = 0; n < 2; n++) {
                            float v = here[(t * 16 + half * 8 + g) * SCORES + k * 16 + side * 8 + 2 * quarter + n];
                            x[k][half][side][n] = v;
                            most[half] = fmaxf(most[half], v);
                        }
            float factor[2], base[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 1));
                most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 2));
                base[half] = most[half] == NOTHING ? 0.0f : most[half];
                factor[half] = exp2_fast(largest[t][half] - base[half]);
                largest[t][half] = most[half];
                total[t][half] *= factor[half];
            }
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; c++)
#pragma unroll
                for (int n = 0; n < 4; n++) acc[t][c][n] *= factor[n >> 1];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 a[4];
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int side = 0; side < 2; side++) {
                        float low = exp2_fast(x[k][half][side][0] - base[half]);
                        float high = exp2_fast(x[k][half][side][1] - base[half]);
                        total[t][half] += low + high;
                        a[side * 2 + half] = pack_bf16(low, high);
                    }
#pragma unroll
                for (int c = 0; c < COLUMNS / 16; c++) {
                    u32 b[4];
                    load_matrices_transposed(b, values + k * 16 * STRIDE + c * 32);
                    mma(acc[t][2 * c], a, b[0], b[1]);
                    mma(acc[t][2 * c + 1], a, b[2], b[3]);
                }
            }
        }
        __syncthreads();
        if (chunk + 2 < end) fetch(chunk + 2, stage, true);
    }

    float* part = (float*)raw;  // [16 * TILES][PART], in place of the entries
    float* logs = scores;       // [16 * TILES]
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            total[t][half] += __shfl_xor_sync(~0u, total[t][half], 1);
            total[t][half] += __shfl_xor_sync(~0u, total[t][half], 2);
            int row = t * 16 + half * 8 + g;
            if (row >= rows) continue;
            float inverse = total[t][half] > 0.0f ? 1.0f / total[t][half] : 0.0f;
            float log = largest[t][half] + __log2f(total[t][half]);  // minus infinity where nothing was seen
            long long at = row_offset + row;
            int column = warp * COLUMNS + 2 * quarter;
            if (CLUSTER == 1 && p.splits == 1) {
#pragma unroll
                for (int c = 0; c < COLUMNS / 8; c++)
                    *(u32*)(p.y + at * LATENT + column + 8 * c) =
                        pack_bf16(acc[t][c][2 * half] * inverse, acc[t][c][2 * half + 1] * inverse);
                continue;
            }
            float* to = CLUSTER > 1 ? part + row * PART + column
                                    : p.parts + ((long long)split * p.rows + at) * LATENT + column;
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; c++)
                *(float2*)(to + 8 * c) = float2{acc[t][c][2 * half] * inverse, acc[t][c][2 * half + 1] * inverse};
            if (warp == 0 && quarter == 0) *(CLUSTER > 1 ? logs + row : p.sums + (long long)split * p.rows + at) = log;
        }
#if CLUSTER > 1
    // Every block takes its share of the rows' columns from all parts.
    cluster_barrier();
    bool last = p.splits == CLUSTER;
    long long merged = (long long)(split / CLUSTER) * p.rows + row_offset;
    for (int i = split % CLUSTER * 32 * WARPS + threadIdx.x; i < rows * (LATENT / 4); i += CLUSTER * 32 * WARPS) {
        int row = i / (LATENT / 4), column = i % (LATENT / 4) * 4;
        float weights[CLUSTER], most = NOTHING, sum = 0.0f, y[4] = {};
        float4 values[CLUSTER];
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) weights[r] = cluster_float(shared_address(logs + row), r);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) values[r] = cluster_floats(shared_address(part + row * PART + column), r);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) most = fmaxf(most, weights[r]);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            weights[r] = weights[r] > NOTHING ? exp2_fast(weights[r] - most) : 0.0f;
            sum += weights[r];
            y[0] += weights[r] * values[r].x, y[1] += weights[r] * values[r].y;
            y[2] += weights[r] * values[r].z, y[3] += weights[r] * values[r].w;
        }
        float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int n = 0; n < 4; n++) y[n] *= inverse;
        if (last) {
            *(uint2*)(p.y + (row_offset + row) * LATENT + column) = uint2{pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])};
        } else {
            *(float4*)(p.parts + (merged + row) * LATENT + column) = float4{y[0], y[1], y[2], y[3]};
            if (column == 0) p.sums[merged + row] = most + __log2f(sum);
        }
    }
    cluster_barrier();  // others may still read this block's part
#endif
}
