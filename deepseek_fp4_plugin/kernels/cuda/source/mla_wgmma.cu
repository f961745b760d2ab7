// Absorbed latent attention of R1's widths over the paged cache, on Hopper's matrix unit.
//
// Rows (query, head) of one request are the rows of a matrix; a block has 64 of them and a part of the context, 64 cached
// entries at a time. Entries lie in shared memory as nine columns of rows of 128 bytes, which the matrix unit reads both
// ways: along the rows as keys, across them as values. Four warps fetch them, a chunk ahead. Two warpgroups have half of
// the value columns each, and make the scores and probabilities of every other chunk: while one is at those, the other
// one's scores are multiplied. The parts of a context are merged by `mla_merge`.
//
// LATENT, ROPE: widths, 512 and 64.  FP8: entries are E4M3, else BF16.
#include "mla.cuh"
#include "wgmma.cuh"

static_assert(LATENT == 512 && ROPE == 64, "two warpgroups have 256 value columns each");
constexpr int ROWS = 64, CHUNK = 64, COLUMNS = WIDTH / 64, COLUMN = 64 * 128, ENTRY = FP8 ? WIDTH : WIDTH * 2;
constexpr int CONSUMERS = 256, PRODUCERS = 128;
// Of 504 registers that three warpgroups' threads have together. A chunk of FP8 waits in those of what fetches.
constexpr int PRODUCER_REGISTERS = FP8 ? 88 : 40, CONSUMER_REGISTERS = (504 - PRODUCER_REGISTERS) / 16 * 8;

struct Shared {
    u8 queries[COLUMNS * COLUMN];
    u8 entries[2][COLUMNS * COLUMN];
    u8 probabilities[COLUMN];
    float largest[ROWS], totals[2][ROWS];  // scores so far, and sums by the warpgroups
    u64 full[2], empty[2], even_made, sums_made;
    int scores_first;
};

// The block's part of a request.
struct Part {
    int split, request, start, context, length, first_row, rows;
    int begin, chunks, end;  // first chunk, how many, entry that the part ends before
};

__device__ inline void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int ID, int THREADS>
__device__ inline void named_wait() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
template <int ID, int THREADS>
__device__ inline void named_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
enum { QUERIES_READ = 1, ODD_MADE, ORDER_CHOSEN };

// Where 16 bytes of a row of 128 lie.
__device__ inline u32 place(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

__device__ inline bool barrier_is_past(u32 barrier, u32 parity) {
    u32 past;
    asm volatile("{\n.reg .pred past;\nmbarrier.test_wait.parity.shared::cta.b64 past, [%1], %2;\nselp.u32 %0, 1, 0, past;\n}"
                 : "=r"(past)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return past;
}

// ---- what fetches

constexpr int LANES = FP8 ? 4 : 8, APART = PRODUCERS / LANES, TURNS = CHUNK / APART;  // threads of a row's 64 values

// Where a thread's 16 bytes of its rows begin. Nothing reads past the part's end; what lies there may be NaN.
__device__ inline void locate(const Parameters& p, const Part& part, int chunk, const u8* (&from)[TURNS]) {
    int thread = threadIdx.x - CONSUMERS;
    long long pages[TURNS];
    int within[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int token = min(chunk * CHUNK + thread / LANES + i * APART, part.end - 1);
        pages[i] = load_early(p.tables + (long long)part.request * p.table_stride + token / p.block_size);
        within[i] = token % p.block_size;
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        from[i] = p.cache + (pages[i] * p.block_size + within[i]) * ENTRY + thread % LANES * 16;
}

__device__ inline void announce(Shared& shared, int index) {
    shared_fence();
    barrier_arrive_if(shared_address(shared.full + (index & 1)), true);
}
__device__ inline u32 place_is_free(int index) { return (index / 2 - 1) & 1; }  // the phase of the barrier

#if FP8
// A chunk waits in registers until its place is free.
__device__ inline void produce(const Parameters& p, const Part& part, Shared& shared) {
    int thread = threadIdx.x - CONSUMERS, piece = thread % LANES;
    wait_for_kernels_before();
    for (int i = 0; i < part.chunks; i++) {
        const u8* from[TURNS];
        Quad q[TURNS][COLUMNS] = {};
        locate(p, part, part.begin + i, from);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            bool present = (part.begin + i) * CHUNK + thread / LANES + turn * APART < part.end;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) load_quad_if(q[turn][c], from[turn] + c * 64, present);
        }
        if (i > 1) barrier_wait(shared_address(shared.empty + (i & 1)), place_is_free(i));
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            u32 to = shared_address(shared.entries[i & 1]);
            int row = thread / LANES + turn * APART;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const Quad& raw = q[turn][c];
                Quad low, high;
                decode_fp8(raw.x, low.x, low.y), decode_fp8(raw.y, low.z, low.w);
                decode_fp8(raw.z, high.x, high.y), decode_fp8(raw.w, high.z, high.w);
                store_shared(to + c * COLUMN + place(row, 2 * piece), low);
                store_shared(to + c * COLUMN + place(row, 2 * piece + 1), high);
            }
        }
        announce(shared, i);
    }
}
#else
enum Entries { OLD, NEW, ALL };  // those of earlier steps, and the others with zeros behind the part's end

template <Entries WHICH>
__device__ inline void fetch(const Part& part, int chunk, const u8* const (&from)[TURNS], u32 to) {
    int thread = threadIdx.x - CONSUMERS, piece = thread % LANES, fresh = part.context - part.length;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int row = thread / LANES + i * APART, token = chunk * CHUNK + row;
        bool present = token < part.end;
        if (WHICH != ALL && (token < min(fresh, part.end)) != (WHICH == OLD)) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) copy_quad(to + c * COLUMN + place(row, piece), from[i] + c * 128, present);
    }
    copies_commit();
}

// Lengths, tables and the entries of earlier steps are there before the kernels ahead have ended: see mla_decode.cu.
__device__ inline void produce(const Parameters& p, const Part& part, Shared& shared) {
    const u8* from[TURNS];
    locate(p, part, part.begin, from);
    fetch<OLD>(part, part.begin, from, shared_address(shared.entries[0]));
    wait_for_kernels_before();
    fetch<NEW>(part, part.begin, from, shared_address(shared.entries[0]));
    for (int i = 1; i < part.chunks; i++) {
        locate(p, part, part.begin + i, from);
        bool waiting = true;  // for the copies before
        if (i > 1) {
            u32 empty = shared_address(shared.empty + (i & 1));
            if (!barrier_is_past(empty, place_is_free(i))) {
                copies_wait<0>();
                announce(shared, i - 1);
                waiting = false;
            }
            barrier_wait(empty, place_is_free(i));
        }
        fetch<ALL>(part, part.begin + i, from, shared_address(shared.entries[i & 1]));
        if (waiting) {
            copies_wait<1>();
            announce(shared, i - 1);
        }
    }
    copies_wait<0>();
    announce(shared, part.chunks - 1);
}
#endif

// ---- what multiplies

__device__ inline void read_queries(const Parameters& p, const Part& part, u32 to) {
    constexpr int APART = CONSUMERS / 8;
    int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < ROWS / APART; i++) {
        int row = (int)threadIdx.x / 8 + i * APART, at = part.first_row + row;
        bool present = row < part.rows;
        const u16 *latent = p.q_latent, *rope = p.q_rope;
        if (present) {
            long long token = part.start + at / p.heads, head = at % p.heads;
            latent += token * p.latent_token + head * p.latent_head + piece * 8;
            rope += token * p.rope_token + head * p.rope_head + piece * 8;
        }
#pragma unroll
        for (int c = 0; c < COLUMNS - 1; c++)
            copy_quad(to + c * COLUMN + place(row, piece), latent + (present ? c * 64 : 0), present);
        copy_quad(to + (COLUMNS - 1) * COLUMN + place(row, piece), rope, present);
    }
    copies_commit();
    copies_wait<0>();
    shared_fence();
    named_wait<QUERIES_READ, CONSUMERS>();
}

// What a thread of a warpgroup knows of its rows, `row` and the eighth behind it.
struct State {
    int row, quarter, seen[2];  // entries that they see
    float largest[2], total[2];
};

__device__ inline void score(float (&s)[32], u32 queries, u32 keys) {
    u64 a = swizzled_rows(queries), b = swizzled_rows(keys);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        int at = (step / 4 * COLUMN + step % 4 * 32) >> 4;
        wgmma_rows(s, a + at, b + at, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

// The sums so far in units of a new largest score.
__device__ inline void rescale(State& state, const float (&largest)[2], float (&acc)[128]) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        factor[half] = largest[half] == state.largest[half] ? 1.0f : exp2_fast(state.largest[half] - largest[half]);
        state.largest[half] = largest[half];
        state.total[half] *= factor[half];
    }
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 128; i++) acc[i] *= factor[i >> 1 & 1];
    }
}

// Scores of the chunk that begins at `first` become probabilities, here and in shared memory.
__device__ inline void weigh(Shared& shared, State& state, float (&s)[32], int first, int end, float scale, float (&acc)[128],
                             u32 (&a)[CHUNK / 16][4]) {
    if (first + CHUNK > min(end, min(state.seen[0], state.seen[1]))) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int limit = min(state.seen[half], end) - first - 2 * state.quarter;
#pragma unroll
            for (int i = 0; i < 16; i++)
                if (i / 2 * 8 + i % 2 >= limit) s[i / 2 * 4 + 2 * half + i % 2] = NOTHING;
        }
    }
    float largest[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            most[j] = fmaxf(fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]),
                            fmaxf(s[4 * j + 16 + 2 * half], s[4 * j + 16 + 2 * half + 1]));
        float whole = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
        whole = fmaxf(whole, __shfl_xor_sync(~0u, whole, 1));
        whole = fmaxf(whole, __shfl_xor_sync(~0u, whole, 2));
        largest[half] = fmaxf(state.largest[half], whole * scale);
        if (state.quarter == 0) shared.largest[state.row + 8 * half] = largest[half];
    }
    float sums[2][2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float base = largest[half] == NOTHING ? 0.0f : largest[half];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float low = exp2_fast(s[4 * j + 2 * half] * scale - base), high = exp2_fast(s[4 * j + 2 * half + 1] * scale - base);
            sums[half][j & 1] += low + high;
            u32 pair = a[j / 2][j % 2 * 2 + half] = pack_bf16(low, high);
            *(u32*)(shared.probabilities + place(state.row + 8 * half, j) + 4 * state.quarter) = pair;
        }
    }
    shared_fence();
    rescale(state, largest, acc);
#pragma unroll
    for (int half = 0; half < 2; half++) state.total[half] += sums[half][0] + sums[half][1];
}

// A warpgroup's columns of a chunk's values by its own probabilities, or by the other's.
__device__ inline void add_own(float (&acc)[128], const u32 (&a)[CHUNK / 16][4], u32 values) {
    u64 b = swizzled_columns(values, COLUMN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_columns(acc, a[step], b + (step * 2048 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
}
__device__ inline void add_others(const Shared& shared, State& state, float (&acc)[128], u32 values) {
    float largest[2] = {shared.largest[state.row], shared.largest[state.row + 8]};
    rescale(state, largest, acc);
    u64 a = swizzled_rows(shared_address(shared.probabilities)), b = swizzled_columns(values, COLUMN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_columns(acc, a + (step * 32 >> 4), b + (step * 2048 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
}

template <int GROUP>
__device__ inline void consume(const Parameters& p, const Part& part, Shared& shared) {
    int lane = threadIdx.x & 31;
    State state;
    state.row = (threadIdx.x >> 5 & 3) * 16 + (lane >> 2), state.quarter = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.seen[half] = part.context - part.length + (part.first_row + state.row + 8 * half) / p.heads + 1;
        state.largest[half] = NOTHING, state.total[half] = 0.0f;
    }
    float acc[128] = {};
    u32 queries = shared_address(shared.queries), entries[2], a[CHUNK / 16][4];
    u32 even_made = shared_address(&shared.even_made), full[2], empty[2], values = GROUP * (LATENT / 128) * COLUMN;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        entries[i] = shared_address(shared.entries[i]);
        full[i] = shared_address(shared.full + i), empty[i] = shared_address(shared.empty + i);
    }
    wait_for_kernels_before();
    read_queries(p, part, queries);

    for (int i = 0; i < part.chunks; i += 2) {
        u32 parity = i >> 1 & 1;
        int first = (part.begin + i) * CHUNK;
        bool odd = i + 1 < part.chunks;
        float s[32];
        if (GROUP == 0) {
            barrier_wait(full[0], parity);
            score(s, queries, entries[0]);
            weigh(shared, state, s, first, part.end, p.scale, acc, a);
            barrier_arrive_if(even_made, true);
            add_own(acc, a, entries[0] + values);
            barrier_arrive_if(empty[0], lane == 0);
            if (odd) {
                named_wait<ODD_MADE, CONSUMERS>();
                barrier_wait(full[1], parity);
                add_others(shared, state, acc, entries[1] + values);
                barrier_arrive_if(empty[1], lane == 0);
            }
        } else {
            // What is there first: the odd chunk, or the even one's probabilities.
            if (threadIdx.x == 128) {
                bool scores = false;
                while (!(scores = odd && barrier_is_past(full[1], parity)) && !barrier_is_past(even_made, parity)) {}
                shared.scores_first = scores;
            }
            named_wait<ORDER_CHOSEN, 128>();
            bool scored = shared.scores_first;
            if (scored) score(s, queries, entries[1]);
            barrier_wait(even_made, parity);
            barrier_wait(full[0], parity);
            add_others(shared, state, acc, entries[0] + values);
            barrier_arrive_if(empty[0], lane == 0);
            if (odd) {
                barrier_wait(full[1], parity);
                if (!scored) score(s, queries, entries[1]);
                weigh(shared, state, s, first + CHUNK, part.end, p.scale, acc, a);
                named_arrive<ODD_MADE, CONSUMERS>();
                add_own(acc, a, entries[1] + values);
                barrier_arrive_if(empty[1], lane == 0);
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.total[half] += __shfl_xor_sync(~0u, state.total[half], 1);
        state.total[half] += __shfl_xor_sync(~0u, state.total[half], 2);
        if (state.quarter == 0) shared.totals[GROUP][state.row + 8 * half] = state.total[half];
    }
    // Not a named barrier: racecheck does not see that one arrives behind the other's writes there.
    u32 sums_made = shared_address(&shared.sums_made);
    barrier_arrive_if(sums_made, true);
    barrier_wait(sums_made, 0);
    int column = GROUP * 256 + 2 * state.quarter;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = state.row + 8 * half;
        if (row >= part.rows) continue;
        float sum = shared.totals[0][row] + shared.totals[1][row], inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        long long at = (long long)part.start * p.heads + part.first_row + row;
        if (p.splits == 1) {
#pragma unroll
            for (int j = 0; j < 32; j++)
                *(u32*)(p.y + at * LATENT + column + 8 * j) =
                    pack_bf16(acc[4 * j + 2 * half] * inverse, acc[4 * j + 2 * half + 1] * inverse);
            continue;
        }
        at += (long long)part.split * p.rows;
#pragma unroll
        for (int j = 0; j < 32; j++)
            *(float2*)(p.parts + at * LATENT + column + 8 * j) =
                float2{acc[4 * j + 2 * half] * inverse, acc[4 * j + 2 * half + 1] * inverse};
        if (GROUP == 0 && state.quarter == 0) p.sums[at] = state.largest[half] + __log2f(sum);  // minus infinity: nothing seen
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1) mla_wgmma(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared& shared = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 2; stage++) {
            barrier_init(shared_address(shared.full + stage), PRODUCERS);
            barrier_init(shared_address(shared.empty + stage), CONSUMERS / 32);
        }
        barrier_init(shared_address(&shared.even_made), 128);
        barrier_init(shared_address(&shared.sums_made), CONSUMERS);
        barrier_fence();
    }
    __syncthreads();
    let_next_kernel_begin();

    Part part;
    part.split = (int)blockIdx.x, part.request = (int)blockIdx.z, part.first_row = (int)blockIdx.y * ROWS;
    part.start = (int)load_early(p.starts + part.request);
    part.length = (int)load_early(p.starts + part.request + 1) - part.start;
    part.context = (int)load_early(p.contexts + part.request);
    part.rows = min(ROWS, part.length * p.heads - part.first_row);
    int chunks = (part.context + CHUNK - 1) / CHUNK, end = (int)((long long)(part.split + 1) * chunks / p.splits);
    part.begin = (int)((long long)part.split * chunks / p.splits);
    part.chunks = end - part.begin, part.end = min(end * CHUNK, part.context);
    if (part.rows <= 0 || part.begin == end) {
        wait_for_kernels_before();  // or what waits for this one would not wait for those
        if ((int)threadIdx.x < part.rows)
            p.sums[(long long)part.split * p.rows + (long long)part.start * p.heads + part.first_row + threadIdx.x] = NOTHING;
        return;
    }
    int group = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        produce(p, part, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        if (group == 0) consume<0>(p, part, shared);
        else consume<1>(p, part, shared);
    }
}
