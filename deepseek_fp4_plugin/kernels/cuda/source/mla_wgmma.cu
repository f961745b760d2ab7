// Absorbed latent attention of R1's widths over the paged cache, on Hopper's matrix unit.
//
// Rows (query, head) of one request are the rows of a matrix; a block has 64 of them and a part of the context, 64 cached
// entries at a time. Entries lie in shared memory as nine columns of rows of 128 bytes, which the matrix unit reads both
// ways: along the rows as keys, across them as values. Four warps fetch them, a chunk ahead, each half of a chunk's columns
// as its place becomes free. Two warpgroups have half of the value columns each, and make the scores and probabilities of
// every other chunk: while one is at those, the other one's are multiplied. The parts of a context are merged by `mla_merge`.
//
// LATENT, ROPE: widths, 512 and 64.  FP8: entries are E4M3, else BF16.
#include "mla.cuh"
#include "wgmma.cuh"

static_assert(LATENT == 512 && ROPE == 64, "two warpgroups have 256 value columns each");
constexpr int ROWS = 64, CHUNK = 64, COLUMNS = WIDTH / 64, COLUMN = 64 * 128, ENTRY = FP8 ? WIDTH : WIDTH * 2;
constexpr int HALF = LATENT / 128;  // columns of 128 bytes that a warpgroup's values are
constexpr float MARGIN = 8.0f;      // how much larger than the unit a score is before sums change it
constexpr int CONSUMERS = 256, PRODUCERS = 128;
// Of 504 registers that three warpgroups' threads have together. A chunk of FP8 waits in those of what fetches.
constexpr int PRODUCER_REGISTERS = FP8 ? 88 : 56, CONSUMER_REGISTERS = (504 - PRODUCER_REGISTERS) / 16 * 8;

struct Shared {
    u8 queries[COLUMNS * COLUMN];
    u8 entries[2][COLUMNS * COLUMN];
    u8 probabilities[COLUMN];
    float largest[ROWS], totals[2][ROWS];  // rows' units, and sums by the warpgroups
    u64 full[2][2], empty[2][2];           // of the halves of a place
    u64 even_made, odd_made, sums_made;
};

// The block's part of a request.
struct Part {
    int split, request, start, context, length, first_row, rows;
    int begin, chunks, end;  // first chunk, how many, entry that the part ends before
};

template <int ID, int THREADS>
__device__ inline void named_wait() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
// Waits in the same way, and tells whether any of the threads says so.
template <int ID, int THREADS>
__device__ inline bool named_any(bool mine) {
    u32 any;
    asm volatile("{\n.reg .pred mine, any;\nsetp.ne.u32 mine, %3, 0;\nbar.red.or.pred any, %1, %2, mine;\nselp.u32 %0, 1, 0, any;\n}"
                 : "=r"(any)
                 : "n"(ID), "n"(THREADS), "r"((u32)mine)
                 : "memory");
    return any;
}
enum { QUERIES_READ = 1, ORDER_CHOSEN };

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

// Where a thread's rows of a chunk lie. Nothing reads past the part's end; what lies there may be NaN.
struct Rows {
    int pages[TURNS], within[TURNS];
};

__device__ inline void ask(const Parameters& p, const Part& part, int chunk, Rows& rows) {
    int thread = threadIdx.x - CONSUMERS;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int token = min(chunk * CHUNK + thread / LANES + i * APART, part.end - 1);
        const long long* page = p.tables + (long long)part.request * p.table_stride + token / p.block_size;
        rows.pages[i] = load_early((const int*)page);  // its lower half
        rows.within[i] = token % p.block_size;
    }
}

__device__ inline void locate(const Parameters& p, const Rows& rows, const u8* (&from)[TURNS]) {
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        from[i] = p.cache + ((long long)rows.pages[i] * p.block_size + rows.within[i]) * ENTRY + threadIdx.x % LANES * 16;
}

__device__ inline u32 place_is_free(int index) { return (index / 2 - 1) & 1; }  // the phase of the barrier

#if FP8
// A chunk waits in registers until its place is free.
__device__ inline void produce(const Parameters& p, const Part& part, Shared& shared) {
    int thread = threadIdx.x - CONSUMERS, piece = thread % LANES;
    wait_for_kernels_before();
    for (int i = 0; i < part.chunks; i++) {
        Rows rows;
        const u8* from[TURNS];
        ask(p, part, part.begin + i, rows);
        locate(p, rows, from);
        Quad q[TURNS][COLUMNS] = {};
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            bool present = (part.begin + i) * CHUNK + thread / LANES + turn * APART < part.end;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) load_quad_if(q[turn][c], from[turn] + c * 64, present);
        }
        if (i > 1)
            for (int half = 0; half < 2; half++) barrier_wait(shared_address(&shared.empty[i & 1][half]), place_is_free(i));
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
        for (int half = 0; half < 2; half++) {
            shared_fence();
            barrier_arrive_if(shared_address(&shared.full[i & 1][half]), true);
        }
    }
}
#else
enum Entries { OLD, NEW, ALL };  // those of earlier steps, and the others with zeros behind the part's end

// A half of a chunk: the columns of a warpgroup's values, and the rotary column with the half that comes first.
template <Entries WHICH>
__device__ inline void fetch(const Part& part, int chunk, const u8* const (&from)[TURNS], u32 to, int half, bool rope) {
    int thread = threadIdx.x - CONSUMERS, piece = thread % LANES, fresh = part.context - part.length;
    to += half * HALF * COLUMN;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int row = thread / LANES + i * APART, token = chunk * CHUNK + row;
        bool present = token < part.end;
        if (WHICH != ALL && (token < min(fresh, part.end)) != (WHICH == OLD)) continue;
        const u8* first = from[i] + half * HALF * 128;
#pragma unroll
        for (int c = 0; c < HALF; c++) copy_quad(to + c * COLUMN + place(row, piece), first + c * 128, present);
        if (rope) {
            int c = (2 - half) * HALF;
            copy_quad(to + c * COLUMN + place(row, piece), first + c * 128, present);
        }
    }
    copies_commit();
}

// The half whose values the chunk's maker has comes first: it is scored first, and mostly free first. Pages are asked for a
// chunk ahead: they take longer than copies. Lengths, tables and the entries of earlier steps are there before the
// kernels ahead have ended: see mla_decode.cu.
__device__ inline void produce(const Parameters& p, const Part& part, Shared& shared) {
    Rows rows;
    const u8* from[TURNS];
    ask(p, part, part.begin, rows);
    locate(p, rows, from);
    for (int turn = 0; turn < 2; turn++) fetch<OLD>(part, part.begin, from, shared_address(shared.entries[0]), turn, turn == 0);
    ask(p, part, part.begin + 1, rows);
    wait_for_kernels_before();
    for (int turn = 0; turn < 2; turn++) {
        fetch<NEW>(part, part.begin, from, shared_address(shared.entries[0]), turn, turn == 0);
        copies_arrive(shared_address(&shared.full[0][turn]));
    }
    for (int i = 1; i < part.chunks; i++) {
        locate(p, rows, from);
        ask(p, part, part.begin + i + 1, rows);
        for (int turn = 0; turn < 2; turn++) {
            int half = (i + turn) & 1;
            if (i > 1) barrier_wait(shared_address(&shared.empty[i & 1][half]), place_is_free(i));
            fetch<ALL>(part, part.begin + i, from, shared_address(shared.entries[i & 1]), half, turn == 0);
            copies_arrive(shared_address(&shared.full[i & 1][half]));
        }
    }
    copies_wait<0>();
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

__device__ inline void wait_for_entries(u32 full, u32 parity) {
    barrier_wait(full, parity);
    if (!FP8) shared_fence();  // copies arrive by themselves, without a fence of the threads that asked for them
}

// What a thread of a warpgroup knows of its rows, `row` and the eighth behind it.
struct State {
    int row, quarter, seen[2];  // entries that they see
    float largest[2], total[2];
};

// Products of the maker's half and the rotary column, then of the other half, as they come.
template <int GROUP>
__device__ inline void score(float (&s)[32], const u32 (&rotary)[4][4], u32 queries, u32 keys, const u32 (&full)[2], u32 parity) {
    u64 a = swizzled_rows(queries), b = swizzled_rows(keys);
#pragma unroll
    for (int turn = 0; turn < 2; turn++) {
        wait_for_entries(full[turn ? 1 - GROUP : GROUP], parity);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < (turn ? HALF : HALF + 1) * 4; step++) {
            int column = step / 4 == HALF ? 2 * HALF : (turn ? 1 - GROUP : GROUP) * HALF + step / 4;
            int at = (column * COLUMN + step % 4 * 32) >> 4;
            if (column == 2 * HALF) wgmma_bf16(s, rotary[step % 4], b + at);
            else wgmma_rows(s, a + at, b + at, turn + step > 0);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
}

// The sums so far in a new unit.
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

// What a thread makes of its scores of a chunk.
struct Weights {
    u32 a[CHUNK / 16][4];  // probabilities in units of `largest`
    float largest[2], sums[2];
};

// Of the chunk that begins at `first`. The unit stays while scores are at most MARGIN above it.
__device__ inline void weigh(const State& state, float (&s)[32], int first, int end, float scale, Weights& w) {
    if (first + CHUNK > min(end, min(state.seen[0], state.seen[1]))) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int limit = min(state.seen[half], end) - first - 2 * state.quarter;
#pragma unroll
            for (int i = 0; i < 16; i++)
                if (i / 2 * 8 + i % 2 >= limit) s[i / 2 * 4 + 2 * half + i % 2] = NOTHING;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            most[j] = fmaxf(fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]),
                            fmaxf(s[4 * j + 16 + 2 * half], s[4 * j + 16 + 2 * half + 1]));
        float whole = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
        whole = fmaxf(whole, __shfl_xor_sync(~0u, whole, 1));
        whole = fmaxf(whole, __shfl_xor_sync(~0u, whole, 2)) * scale;
        w.largest[half] = whole > state.largest[half] + MARGIN ? whole : state.largest[half];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float base = w.largest[half] == NOTHING ? 0.0f : w.largest[half], sums[2] = {};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float low = exp2_fast(s[4 * j + 2 * half] * scale - base), high = exp2_fast(s[4 * j + 2 * half + 1] * scale - base);
            sums[j & 1] += low + high;
            w.a[j / 2][j % 2 * 2 + half] = pack_bf16(low, high);
        }
        w.sums[half] = sums[0] + sums[1];
    }
}

// For the other warpgroup. A warp's rows take the place of those that its own lanes and last products read.
__device__ inline void publish(Shared& shared, const State& state, const Weights& w) {
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (state.quarter == 0) shared.largest[state.row + 8 * half] = w.largest[half];
    u32 to = shared_address(shared.probabilities);
    int row = (threadIdx.x >> 5 & 3) * 16 + (threadIdx.x & 15), piece = threadIdx.x >> 4 & 1;
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) store_matrices(to + place(row, 2 * step + piece), w.a[step]);
    shared_fence();
}

// A warpgroup's columns of a chunk's values by its own probabilities, or by the other's.
__device__ inline void add_own(State& state, float (&acc)[128], const Weights& w, u32 values) {
    rescale(state, w.largest, acc);
#pragma unroll
    for (int half = 0; half < 2; half++) state.total[half] += w.sums[half];
    u64 b = swizzled_columns(values, COLUMN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_columns(acc, w.a[step], b + (step * 2048 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
}
__device__ inline void begin_others(const Shared& shared, State& state, float (&acc)[128], u32 values) {
    float largest[2] = {shared.largest[state.row], shared.largest[state.row + 8]};
    rescale(state, largest, acc);
    u64 a = swizzled_rows(shared_address(shared.probabilities)), b = swizzled_columns(values, COLUMN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) wgmma_columns(acc, a + (step * 32 >> 4), b + (step * 2048 >> 4));
    wgmma_commit();
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
    u32 queries = shared_address(shared.queries), entries[2];
    u32 even_made = shared_address(&shared.even_made), odd_made = shared_address(&shared.odd_made);
    u32 full[2][2], empty[2], values = GROUP * HALF * COLUMN;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        entries[i] = shared_address(shared.entries[i]);
        full[i][0] = shared_address(&shared.full[i][0]), full[i][1] = shared_address(&shared.full[i][1]);
        empty[i] = shared_address(&shared.empty[i][GROUP]);
    }
    wait_for_kernels_before();
    read_queries(p, part, queries);
    u32 rotary[4][4];
#pragma unroll
    for (int step = 0; step < 4; step++) {
        u32 piece = place((threadIdx.x >> 5 & 3) * 16 + (lane & 15), 2 * step + (lane >> 4));
        load_matrices(rotary[step], queries + 2 * HALF * COLUMN + piece);
    }

    for (int i = 0; i < part.chunks; i += 2) {
        u32 parity = i >> 1 & 1;
        int first = (part.begin + i) * CHUNK;
        bool odd = i + 1 < part.chunks;
        float s[32];
        Weights w;
        if (GROUP == 0) {
            score<0>(s, rotary, queries, entries[0], full[0], parity);
            weigh(state, s, first, part.end, p.scale, w);
            publish(shared, state, w);
            barrier_arrive_if(even_made, true);
            add_own(state, acc, w, entries[0] + values);
            barrier_arrive_if(empty[0], lane == 0);
            if (odd) {
                barrier_wait(odd_made, parity);
                wait_for_entries(full[1][0], parity);
                begin_others(shared, state, acc, entries[1] + values);
                wgmma_wait<0>();
                barrier_arrive_if(empty[1], lane == 0);
            }
        } else {
            // What is there first: the odd chunk, or the even one's probabilities.
            bool odd_came = false;
            if (threadIdx.x == 128)
                while (!(odd_came = odd && barrier_is_past(full[1][1], parity)) && !barrier_is_past(even_made, parity)) {}
            if (named_any<ORDER_CHOSEN, 128>(odd_came)) {
                score<1>(s, rotary, queries, entries[1], full[1], parity);
                barrier_wait(even_made, parity);
                wait_for_entries(full[0][1], parity);
                begin_others(shared, state, acc, entries[0] + values);
                weigh(state, s, first + CHUNK, part.end, p.scale, w);  // while those are multiplied
                wgmma_wait<0>();
                barrier_arrive_if(empty[0], lane == 0);
            } else {
                barrier_wait(even_made, parity);
                wait_for_entries(full[0][1], parity);
                begin_others(shared, state, acc, entries[0] + values);
                wgmma_wait<0>();
                barrier_arrive_if(empty[0], lane == 0);
                if (odd) {
                    score<1>(s, rotary, queries, entries[1], full[1], parity);
                    weigh(state, s, first + CHUNK, part.end, p.scale, w);
                }
            }
            if (odd) {
                publish(shared, state, w);
                barrier_arrive_if(odd_made, true);
                add_own(state, acc, w, entries[1] + values);
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
            for (int half = 0; half < 2; half++) {
                barrier_init(shared_address(&shared.full[stage][half]), PRODUCERS);
                barrier_init(shared_address(&shared.empty[stage][half]), CONSUMERS / 64);
            }
        }
        // Not named barriers, at which one side only arrives: racecheck does not see that its writes come before.
        barrier_init(shared_address(&shared.even_made), 128);
        barrier_init(shared_address(&shared.odd_made), 128);
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
