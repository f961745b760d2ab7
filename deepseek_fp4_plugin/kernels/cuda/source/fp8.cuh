// BF16 rows as E4M3, each under a scale that makes its largest magnitude 448; see numerics/fp8_rows.py.
#pragma once
#include "device.cuh"

struct RowScale {
    float inverse, scale;  // what values are multiplied by, and what makes up for it
};

__device__ inline u32 larger(u32 a, u32 b) {  // of each half
    u32 result;
    asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// Of a row, whose threads are a block's WARPS. of_warps may be written again behind one more barrier.
template <int WARPS>
__device__ inline RowScale row_scale(const u16* x, int width, u32 (&of_warps)[WARPS]) {
    u32 largest = 0;  // magnitudes of two values, as bits: what is not finite is larger than all others
    for (int i = (int)threadIdx.x * 8; i < width; i += WARPS * 32 * 8) {
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
    float amax = from_bf16((u16)bits);
    bool held = amax >= 0x1p-100f;
    return {held ? 448.0f / amax : 0.0f, bits >= 0x7F80 ? __int_as_float(0x7FC00000) : held ? amax / 448.0f : 0.0f};
}
