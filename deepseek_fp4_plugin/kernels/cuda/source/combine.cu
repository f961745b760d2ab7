// The weighted sum over each token's experts.
#include "device.cuh"

struct Parameters {
    const u16* outputs;      // [tokens * k][width], of each choice
    const long long* ids;    // [tokens * k], below 0: not here, and its outputs were not written
    const float* weights;    // [tokens * k]
    u16* y;                  // [tokens][width]
    int width, k;            // width a multiple of 8
};

extern "C" __global__ void __launch_bounds__(128) combine(const __grid_constant__ Parameters p) {
    int column = ((int)blockIdx.x * 128 + (int)threadIdx.x) * 8, first = (int)blockIdx.y * p.k;
    let_next_kernel_begin();
    wait_for_kernels_before();
    if (column >= p.width) return;
    float sums[8] = {};
    for (int i = first; i < first + p.k; i++) {
        if (p.ids[i] < 0) continue;
        Quad q = load_quad(p.outputs + (u64)i * p.width + column);
        u32 words[4] = {q.x, q.y, q.z, q.w};
        float weight = p.weights[i];
#pragma unroll
        for (int n = 0; n < 8; n++) sums[n] += from_bf16((u16)(words[n / 2] >> (n % 2 * 16))) * weight;
    }
    *(Quad*)(p.y + (u64)blockIdx.y * p.width + column) =
        Quad{pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]), pack_bf16(sums[4], sums[5]), pack_bf16(sums[6], sums[7])};
}
