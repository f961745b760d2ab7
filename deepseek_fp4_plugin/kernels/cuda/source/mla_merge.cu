// A context's attention from that over its parts, in their order.
//
// LATENT, ROPE: widths.  CLUSTER: blocks of attention that made a part.
#include "mla.cuh"

// A row of the output from its parts: threads (column / 4, part modulo MERGERS).
constexpr int MERGERS = 4, MAX_SPLITS = 256;

extern "C" __global__ void __launch_bounds__(MERGERS * LATENT / 4) mla_merge(const __grid_constant__ Parameters p) {
    __shared__ float weights[MAX_SPLITS], gathered[MERGERS][LATENT];
    let_next_kernel_begin();
    wait_for_kernels_before();
    long long row = blockIdx.x;
    int parts = p.splits / CLUSTER;
    int column = (int)threadIdx.x % (LATENT / 4) * 4, merger = (int)threadIdx.x / (LATENT / 4);
    if (threadIdx.x < 32) {
        float most = NOTHING, total = 0.0f;
        for (int split = threadIdx.x; split < parts; split += 32) {
            weights[split] = p.sums[(long long)split * p.rows + row];
            most = fmaxf(most, weights[split]);
        }
        for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        for (int split = threadIdx.x; split < parts; split += 32) {
            weights[split] = exp2_fast(weights[split] - most);
            total += weights[split];
        }
        for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
        for (int split = threadIdx.x; split < parts; split += 32) weights[split] /= total;
    }
    __syncthreads();
    float sum[4] = {};
#pragma unroll 8
    for (int split = merger; split < parts; split += MERGERS) {
        float weight = weights[split];
        Quad q = {0, 0, 0, 0};  // an empty part was not written
        load_quad_if(q, p.parts + ((long long)split * p.rows + row) * LATENT + column, weight > 0.0f);
        sum[0] += weight * __uint_as_float(q.x), sum[1] += weight * __uint_as_float(q.y);
        sum[2] += weight * __uint_as_float(q.z), sum[3] += weight * __uint_as_float(q.w);
    }
    *(float4*)&gathered[merger][column] = float4{sum[0], sum[1], sum[2], sum[3]};
    __syncthreads();
    for (int i = threadIdx.x; i < LATENT / 2; i += MERGERS * LATENT / 4) {
        float low = 0.0f, high = 0.0f;
        for (int m = 0; m < MERGERS; m++) low += gathered[m][2 * i], high += gathered[m][2 * i + 1];
        ((u32*)(p.y + row * LATENT))[i] = pack_bf16(low, high);
    }
}
