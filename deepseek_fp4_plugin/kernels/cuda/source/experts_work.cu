// Whose turn it is: choices ordered by expert, and a list of the experts that were chosen. One cluster of blocks.
//
// work: [0] entries of the list, [1] columns of 8 rows that are multiplied at a time; then for each entry its expert and the
// place of its first choice in `order`, and behind the last the place where it ends. Columns are as many as experts have
// rows on average, `columns` at most. An expert of more rows than that has several entries, so that whoever has it is
// not behind all others; beyond two columns there is no need. Choices of an expert come in any order: each is a column
// of its own in the products, whatever the others are.
//
// blocks, where wanted: the same cut into blocks of at most `rows` choices of one expert, as few as there can be. They are of
// sizes: `first` choices at most, `step` more, and so on. Those of an expert are of nearly the same; with `step` above 1 all
// but its last fill their size. They lie by size, small ones first: [0 .. 7] where those of each size end; from [8] on for
// each its expert, its first place, how many, and nothing.
#include "device.cuh"

struct Parameters {
    const long long* ids;  // [choices], below 0: not here
    int* order;            // [choices]
    int* work;             // [2 + 2 * (experts + choices / 8 + 1)], or null
    int* blocks;           // or null
    int choices, experts, columns, rows, first, step;
};

constexpr int THREADS = 512, WARPS = THREADS / 32;  // an expert a thread
constexpr int SIZES = 8;                            // of blocks
constexpr int AT_ONCE = 8;                          // choices that a thread asks for together

// The sum over the warp's threads before this one; the warp's goes into `sums`, for `of_warps` behind a barrier.
__device__ inline int sum_before(int value, int (&sums)[WARPS]) {
    int lane = threadIdx.x & 31, before = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int left = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += left;
    }
    if (lane == 31) sums[threadIdx.x >> 5] = before;
    return before - value;
}

// The sum over the warps before this one, and over all.
__device__ inline int of_warps(const int (&sums)[WARPS], int& all) {
    int before = 0;
    all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < (int)(threadIdx.x >> 5)) before += sums[w];
        all += sums[w];
    }
    return before;
}

extern "C" __global__ void __launch_bounds__(THREADS) experts_work(const __grid_constant__ Parameters p) {
    __shared__ int counts[THREADS], next[THREADS], sums[4 + SIZES][WARPS];  // next: place of an expert's next choice
    int thread = threadIdx.x, cluster = (int)cluster_size(), rank = (int)cluster_rank();
    counts[thread] = 0;
    let_next_kernel_begin();
    wait_for_kernels_before();
    __syncthreads();
    int step = cluster * THREADS, begin = rank * THREADS + thread, held[AT_ONCE];  // ids of its first choices
    auto load = [&](int first, int (&ids)[AT_ONCE]) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) ids[n] = first + n * step < p.choices ? (int)p.ids[first + n * step] : -1;
    };
    load(begin, held);
    auto for_choices = [&](auto work) {
        int ids[AT_ONCE];
        for (int first = begin; first < p.choices; first += AT_ONCE * step) {
            if (first > begin) load(first, ids);
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                int id = first > begin ? ids[n] : held[n];
                if (id >= 0) work(first + n * step, id);
            }
        }
    };
    auto meet = [&]() {
        if (cluster > 1) cluster_barrier();
        else __syncthreads();
    };
    for_choices([&](int, int expert) { atomicAdd(counts + expert, 1); });
    meet();
    int own = 0, before = 0, all_rows, all_used;
    for (int r = 0; r < cluster; r++) {
        int theirs = __float_as_int(cluster_float(shared_address(counts + thread), r));
        own += theirs;
        if (r < rank) before += theirs;
    }
    auto size_of = [&](int count) { return count <= p.first ? 0 : (count - p.first + p.step - 1) / p.step; };
    // Of the parts of a size all but the last, which fill it, and whether the last.
    int parts = p.blocks ? (own + p.rows - 1) / p.rows : 0, each = parts ? (own + parts - 1) / parts : 0;
    if (parts > 1 && p.step > 1) each = p.first + size_of(each) * p.step;
    int full_size = size_of(each), last_size = size_of(own - (parts - 1) * each), part[SIZES];
    auto full = [&](int size) { return parts && full_size == size ? parts - 1 : 0; };
    auto last = [&](int size) { return parts && last_size == size; };
    int place = sum_before(own, sums[0]), slot = sum_before(own > 0, sums[1]);
    int slot_of_8 = sum_before((own + 7) / 8, sums[2 + SIZES]), slot_of_16 = sum_before((own + 15) / 16, sums[3 + SIZES]);
    if (p.blocks) {
#pragma unroll
        for (int size = 0; size < SIZES; size++) part[size] = sum_before(full(size) + last(size), sums[2 + size]);
    }
    __syncthreads();
    place += of_warps(sums[0], all_rows), slot += of_warps(sums[1], all_used);
    next[thread] = place + before;
    if (p.work && rank == 0) {
        int columns = all_rows <= 4 * all_used ? 1 : p.columns <= 2 || all_rows <= 12 * all_used ? 2 : p.columns;
        int most = columns <= 2 ? 8 * columns : own;  // rows of an entry
        if (columns <= 2) slot = (columns == 1 ? slot_of_8 : slot_of_16) + of_warps(sums[1 + columns + SIZES], all_used);
        for (int from = 0; from < own; from += most, slot++) p.work[2 + 2 * slot] = thread, p.work[3 + 2 * slot] = place + from;
        if (thread == 0) p.work[0] = all_used, p.work[1] = columns, p.work[3 + 2 * all_used] = all_rows;
    }
    if (p.blocks && rank == 0) {
        int end = 0;
#pragma unroll
        for (int size = 0; size < SIZES; size++) {
            int all, first = end + part[size] + of_warps(sums[2 + size], all);
            for (int n = 0; n < full(size) + last(size); n++) {
                int index = n < full(size) ? n : parts - 1, count = n < full(size) ? each : own - index * each;
                *(Quad*)(p.blocks + SIZES + 4 * (first + n)) = Quad{(u32)thread, (u32)(place + index * each), (u32)count, 0};
            }
            end += all;
            if (thread == 0) p.blocks[size] = end;
        }
    }
    meet();  // nobody reads another's counts any more
    for_choices([&](int choice, int expert) { p.order[atomicAdd(next + expert, 1)] = choice; });
}
