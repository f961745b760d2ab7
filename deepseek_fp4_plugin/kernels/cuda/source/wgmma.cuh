// Hopper's matrix unit: sums[64 x N] += a[64 x K] b[K x N] of a warpgroup, a in registers, b in shared memory. K is 16 BF16
// values, or 32 of E4M3, whose sums have fewer bits than FP32 has.
#pragma once
#include "device.cuh"

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Rows of 128 bytes (64 values along the sum), 8 of them 1024 bytes, 16-byte pieces of row r at their place XOR r % 8.
__device__ inline u64 swizzled_rows(u32 address) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (u64)((address & 0x3FFFF) >> 4);
}

// The same memory where rows are along the sum: 64 columns, the next 64 `step` bytes further on.
__device__ inline u64 swizzled_columns(u32 address, u32 step) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(step >> 4) << 16 | (u64)((address & 0x3FFFF) >> 4);
}

// The instruction for N columns: N / 2 sums a thread, named by PTX numbers and by constraints, then the operands behind them.
#define KIND_bf16 "k16.f32.bf16.bf16"
#define FLAGS_bf16 "1, 1, 1, 0"
#define KIND_e4m3 "k32.f32.e4m3.e4m3"
#define FLAGS_e4m3 "1, 1, 1"
#define WGMMA(TYPE, N, NUMBERS, SUMS, A0, A1, A2, A3, B)                                                               \
    __device__ inline void wgmma_##TYPE(float (&s)[N / 2], const u32 (&a)[4], u64 b) {                                 \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N KIND_##TYPE " {" NUMBERS "}, {%" #A0 ", %" #A1 ", %" #A2   \
                     ", %" #A3 "}, %" #B ", " FLAGS_##TYPE ";"                                                         \
                     : SUMS                                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }

#define S4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define S16(i) S4(i), S4(i + 4), S4(i + 8), S4(i + 12)
#define N4 "%0,%1,%2,%3"
#define N8 N4 ",%4,%5,%6,%7"
#define N12 N8 ",%8,%9,%10,%11"
#define N16 N8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define N20 N16 ",%16,%17,%18,%19"
#define N24 N16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define N28 N24 ",%24,%25,%26,%27"
#define N32 N24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define N40 N32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define N48 N40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define N56 N48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define N64 N56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define N68 N64 ",%64,%65,%66,%67"
#define N72 N68 ",%68,%69,%70,%71"
#define N76 N72 ",%72,%73,%74,%75"
#define N80 N76 ",%76,%77,%78,%79"
#define N84 N80 ",%80,%81,%82,%83"
#define N88 N84 ",%84,%85,%86,%87"
#define N96 N88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define N104 N96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define N112 N104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define N128 N112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define S8At(i) S4(i), S4(i + 4)
#define S8 S8At(0)
#define S12 S8, S4(8)
#define S20 S16(0), S4(16)
#define S24 S16(0), S8At(16)
#define S28 S24, S4(24)
#define S32 S16(0), S16(16)
#define S40 S32, S8At(32)
#define S48 S32, S16(32)
#define S56 S48, S8At(48)
#define S64 S48, S16(48)
#define S68 S64, S4(64)
#define S72 S64, S8At(64)
#define S76 S72, S4(72)
#define S80 S64, S16(64)
#define S84 S80, S4(80)
#define S88 S80, S8At(80)
#define S96 S80, S16(80)
#define S104 S96, S8At(96)
#define S112 S96, S16(96)
#define S128 S112, S16(112)

WGMMA(bf16, 8, N4, S4(0), 4, 5, 6, 7, 8)
WGMMA(bf16, 16, N8, S8, 8, 9, 10, 11, 12)
WGMMA(bf16, 32, N16, S16(0), 16, 17, 18, 19, 20)
WGMMA(bf16, 64, N32, S32, 32, 33, 34, 35, 36)
WGMMA(bf16, 96, N48, S48, 48, 49, 50, 51, 52)
WGMMA(bf16, 112, N56, S56, 56, 57, 58, 59, 60)
WGMMA(bf16, 128, N64, S64, 64, 65, 66, 67, 68)
WGMMA(bf16, 144, N72, S72, 72, 73, 74, 75, 76)
WGMMA(bf16, 160, N80, S80, 80, 81, 82, 83, 84)

// Both operands in shared memory, by swizzled_rows(). The first product replaces the sums where not `more`.
__device__ inline void wgmma_rows(float (&s)[32], u64 a, u64 b, bool more) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.u32 more, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, %32, %33, more, 1, 1, 0, 0;\n}"
                 : S32
                 : "l"(a), "l"(b), "r"((u32)more));
}

// b by swizzled_columns(), a in registers or in shared memory.
__device__ inline void wgmma_columns(float (&s)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" N128 "}, {%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
                 : S128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void wgmma_columns(float (&s)[128], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" N128 "}, %128, %129, 1, 1, 1, 0, 1;"
                 : S128
                 : "l"(a), "l"(b));
}
