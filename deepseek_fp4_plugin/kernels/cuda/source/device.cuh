// What the kernels share: the tensor core, decoding, copies, dependent launch, clusters. Inline PTX, no CUDA headers.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

#define NOTHING __int_as_float(0xFF800000)  // minus infinity: the score of what is not seen

struct alignas(16) Quad {
    u32 x, y, z, w;
};

// ---- dependent launch

__device__ inline void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- memory

__device__ inline u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// For what an earlier kernel wrote and this one reads before it waits: not from the first cache, which may be older.
__device__ inline long long load_early(const long long* pointer) {
    long long value;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
    return value;
}

__device__ inline int load_early(const int* pointer) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

__device__ inline float load_early(const float* pointer) {
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(pointer) : "memory");
    return value;
}

// Of what nothing writes, asked for here and not where it is used.
__device__ inline float load_float(const float* pointer) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(pointer));
    return value;
}

// Not cached by compilers across waits: activations that the kernel before wrote.
__device__ inline Quad load_quad(const void* pointer) {
    Quad q;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(pointer));
    return q;
}

// The same where `wanted`; elsewhere what was in the registers stays.
__device__ inline void load_quad_if(Quad& q, const void* pointer, bool wanted) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n@wanted ld.global.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w)
                 : "l"(pointer), "r"((u32)wanted));
}

// One of two words for a store: of `?` the compiler makes two stores, each by a part of the lanes and so of parts of lines.
__device__ inline u32 either(bool first, u32 a, u32 b) {
    u32 result;
    asm volatile("{\n.reg .pred first;\nsetp.ne.u32 first, %3, 0;\nselp.b32 %0, %1, %2, first;\n}"
                 : "=r"(result)
                 : "r"(a), "r"(b), "r"((u32)first));
    return result;
}

// Two words of two lanes that are `lanes` apart: the first lane gets both its and the other's first, the second both second ones.
__device__ inline uint2 swapped(u32 first, u32 second, bool second_lane, int lanes) {
    u32 theirs = __shfl_xor_sync(~0u, second_lane ? first : second, lanes);
    return uint2{either(second_lane, theirs, first), either(second_lane, second, theirs)};
}

// For what is read once: the first to leave the second cache, which so keeps what kernels leave for each other, and code.
__device__ inline u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Weights. Not `.nc`: such loads were moved behind a wait that follows them.
__device__ inline Quad load_weights(const void* pointer) {
    Quad q;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(pointer), "l"(read_once()));
    return q;
}

__device__ inline Quad shared_quad(u32 address) {
    Quad q;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(address));
    return q;
}

__device__ inline void store_shared(u32 address, const Quad& q) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory");
}

__device__ inline u32 shared_word(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}

__device__ inline void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ inline void barrier_arrive_if(u32 barrier, bool wanted) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %1, 0;\n@wanted mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(
                     barrier),
                 "r"((u32)wanted)
                 : "memory");
}

// True in one lane of a whole warp, and known to the compiler as such: copies behind `lane == 0` become loops over lanes.
__device__ inline bool elected() {
    u32 one;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(one));
    return one;
}

// Between a thread's own reading and writing of shared memory and copies into it, or the matrix unit's reading.
__device__ inline void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Bytes (a multiple of 16) of global memory into shared memory, counted on a barrier.
__device__ inline void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The same of what is read once.
__device__ inline void bulk_copy_once(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared),
                 "l"(global), "r"(bytes), "r"(barrier), "l"(read_once())
                 : "memory");
}

// 16 bytes of global memory into shared memory, zeros where not `wanted`; a thread waits for its own copies, in groups.
__device__ inline void copy_quad(u32 shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(wanted ? 16 : 0) : "memory");
}

// The same of what is read once, and for 4 bytes of it.
__device__ inline void copy_quad_once(u32 shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(wanted ? 16 : 0), "l"(read_once())
                 : "memory");
}

__device__ inline void copy_word_once(u32 shared, const void* global, bool wanted) {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 4, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(wanted ? 4 : 0), "l"(read_once())
                 : "memory");
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ inline void copies_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Arrives once for the thread when its copies so far have come. Whoever waits makes a fence before the matrix unit reads them.
__device__ inline void copies_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- clusters

__device__ inline u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Its two halves: what lies between them need not wait.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ inline float cluster_float(u32 address, u32 rank) {
    u32 remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote));
    return value;
}

__device__ inline u64 cluster_u64(u32 address, u32 rank) {
    u32 remote;
    u64 value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(remote));
    return value;
}

__device__ inline void cluster_store(u32 address, u32 rank, float value) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

__device__ inline float4 cluster_floats(u32 address, u32 rank) {
    u32 remote;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(remote));
    return v;
}

// ---- BF16

__device__ inline float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ inline u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float round_bf16(float value) { return from_bf16(to_bf16(value)); }

__device__ inline u32 pack_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Two BF16 values times a factor as E4M3; what is too large becomes the largest.
__device__ inline u16 to_fp8(u32 pair, float factor = 1.0f) {
    u16 bytes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(bytes)
        : "f"(from_bf16((u16)(pair >> 16)) * factor), "f"(from_bf16((u16)pair) * factor));
    return bytes;
}

__device__ inline u32 to_fp8(u32 low, u32 high, float factor) { return to_fp8(low, factor) | (u32)to_fp8(high, factor) << 16; }

// Eight BF16 values to FP32 sums, and back.
__device__ inline void add(float (&sums)[8], const Quad& q) {
    const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[2 * i] += from_bf16((u16)words[i]);
        sums[2 * i + 1] += from_bf16((u16)(words[i] >> 16));
    }
}

__device__ inline Quad rounded(const float (&sums)[8]) {
    return {pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]), pack_bf16(sums[4], sums[5]),
            pack_bf16(sums[6], sums[7])};
}

__device__ inline u32 multiply_bf16(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// Four matrices of 8 x 8 BF16 values; a lane gives a row of one, and has two values of a row of each.
__device__ inline void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ inline void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ inline void store_matrices(u32 address, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}

// sums[16 x 8] += a[16 x 16] b[16 x 8], FP32 sums of BF16 products.
__device__ inline void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float silu(float x) { return x / (1.0f + __expf(-x)); }
