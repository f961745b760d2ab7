// BF16 rows as E4M3, each under a scale that makes its largest magnitude 448; see numerics/fp8_rows.py.
#include "device.cuh"

struct Parameters {
    const u16* x;  // [rows][stride]
    u8* numbers;   // [rows][width]
    float* scale;  // [rows]
    int width, stride;  // multiples of 8
};

constexpr float LARGEST = 448, SMALLEST = 0x1p-100f;
constexpr int THREADS = 128;

__device__ inline u32 larger(u32 a, u32 b) {  // of each half
    u32 result;
    asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// A block a row, which it reads twice: the second time from the cache.
extern "C" __global__ void __launch_bounds__(THREADS) round_rows(const __grid_constant__ Parameters p) {
    __shared__ u32 of_warps[THREADS / 32];
    let_next_kernel_begin();
    wait_for_kernels_before();
    const u16* x = p.x + (u64)blockIdx.x * p.stride;
    u32 largest = 0;  // magnitudes of two values, as bits: what is not finite is larger than all others
    for (int i = (int)threadIdx.x * 8; i < p.width; i += THREADS * 8) {
        Quad q = load_quad(x + i);
        const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (u32 word : words) largest = larger(largest, word & 0x7FFF7FFF);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, step));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (u32 theirs : of_warps) largest = larger(largest, theirs);
    u32 bits = max(largest & 0xFFFF, largest >> 16);
    float amax = from_bf16((u16)bits), inverse = amax >= SMALLEST ? LARGEST / amax : 0.0f;
    if (threadIdx.x == 0)
        p.scale[blockIdx.x] = bits >= 0x7F80 ? __int_as_float(0x7FC00000) : amax >= SMALLEST ? amax / LARGEST : 0.0f;
    u8* to = p.numbers + (u64)blockIdx.x * p.width;
    for (int i = (int)threadIdx.x * 8; i < p.width; i += THREADS * 8) {
        Quad q = load_quad(x + i);
        *(u64*)(to + i) = to_fp8(q.x, q.y, inverse) | (u64)to_fp8(q.z, q.w, inverse) << 32;
    }
}
