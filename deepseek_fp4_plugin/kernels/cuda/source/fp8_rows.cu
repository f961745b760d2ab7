// BF16 rows as E4M3, in their order; see fp8.cuh.
#include "fp8.cuh"

struct Parameters {
    const u16* x;       // [rows][stride]
    u8* numbers;        // [rows][width]
    float* scale;       // [rows]
    int width, stride;  // multiples of 8
};

constexpr int WARPS = 4;

// A block a row, which it reads twice: the second time from the cache.
extern "C" __global__ void __launch_bounds__(32 * WARPS) round_rows(const __grid_constant__ Parameters p) {
    __shared__ u32 of_warps[WARPS];
    let_next_kernel_begin();
    wait_for_kernels_before();
    const u16* x = p.x + (u64)blockIdx.x * p.stride;
    RowScale row = row_scale(x, p.width, of_warps);
    if (threadIdx.x == 0) p.scale[blockIdx.x] = row.scale;
    u8* to = p.numbers + (u64)blockIdx.x * p.width;
    for (int i = (int)threadIdx.x * 8; i < p.width; i += 32 * WARPS * 8) {
        Quad q = load_quad(x + i);
        *(u64*)(to + i) = to_fp8(q.x, q.y, row.inverse) | (u64)to_fp8(q.z, q.w, row.inverse) << 32;
    }
}
