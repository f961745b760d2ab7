// NVFP4 tiles to rows, for products of so many rows that a library's matrix product on decoded weights is ahead.
// BF16 values are the weights without the tensor scale, times 2^-16: exact. E4M3 ones are rounded; see numerics/fp8_rows.py.
//
// TURNS: slabs of a warp, asked for together.  FP8: E4M3 values, and the factor of each output beside them.
#include "nvfp4.cuh"

struct Parameters {
    const u8* tiles;         // [experts][groups][slabs][1152], an expert for each block of the grid's second axis
    void* values;            // [experts][out][width]
    const float* row_scale;  // [experts][groups * 16], in the order of the tiles
    float* scale;            // [experts][out]: what the results of E4M3 values are multiplied by; BF16: null
    int groups, slabs, out, width;
    int half;  // 0, or outputs of gate where gate and up take turns of 8
};

#if FP8
using Value = u8;

constexpr float MORE = 0x1p9f;  // of 2^16: the largest values are 21, as those of decode_tile_fp8

// A slab's values, where outputs and inputs are not filled up; 16 of an output in a store.
__device__ inline void store(const Parameters& p, u8* values_at, long long slab, int lane, const Quad (&tiles)[2], u32 scales) {
    int g = lane >> 2, quarter = lane & 3;
    int group = (int)(slab / p.slabs), first = (int)(slab % p.slabs) * SLAB_INPUTS + quarter * 16;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int n = p.half ? group * 8 + g : group * 16 + row * 8 + g, limit = p.half ? p.half : p.out;
        if (n >= limit) continue;
        if (p.half && row) n += p.half;
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            Quad q = tiles[tile];
            u32 pairs[8], quads[4];
            decode_block(pairs, row ? q.z : q.x, row ? q.w : q.y, block_scale(scales, 2 * tile + row));
#pragma unroll
            for (int i = 0; i < 4; i++) quads[i] = to_fp8(pairs[2 * i], pairs[2 * i + 1], MORE);
            int input = first + tile * 64;
            if (input < p.width) *(Quad*)(values_at + (u64)n * p.width + input) = Quad{quads[0], quads[1], quads[2], quads[3]};
        }
        if (first == 0) {
            u64 expert = blockIdx.y;
            p.scale[expert * p.out + n] = p.row_scale[(expert * p.groups + group) * 16 + row * 8 + g] / MORE;
        }
    }
}
#else
using Value = u16;

// With the lane that has the output four further on, or four before.
__device__ inline Quad exchange(Quad mine) {
    return Quad{__shfl_xor_sync(~0u, mine.x, 16), __shfl_xor_sync(~0u, mine.y, 16), __shfl_xor_sync(~0u, mine.z, 16),
                __shfl_xor_sync(~0u, mine.w, 16)};
}

__device__ inline Quad either(bool first, Quad a, Quad b) {
    return Quad{either(first, a.x, b.x), either(first, a.y, b.y), either(first, a.z, b.z), either(first, a.w, b.w)};
}

// A slab's values, where outputs and inputs are not filled up.
__device__ inline void store(const Parameters& p, u16* values_at, long long slab, int lane, const Quad (&tiles)[2], u32 scales) {
    int g = lane >> 2, quarter = lane & 3;
    int group = (int)(slab / p.slabs), first = (int)(slab % p.slabs) * SLAB_INPUTS + quarter * 16;
    bool later = g >= 4;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        Quad q = tiles[tile];
#pragma unroll
        for (int row = 0; row < 2; row++) {
            u32 pairs[8];
            decode_block(pairs, row ? q.z : q.x, row ? q.w : q.y, block_scale(scales, 2 * tile + row));
            Quad low = {pairs[0], pairs[1], pairs[2], pairs[3]}, high = {pairs[4], pairs[5], pairs[6], pairs[7]};
            // A store is whole lines of four outputs, 64 inputs each, not half of the lines of eight: so lanes swap halves.
            Quad theirs = exchange(later ? low : high);
            Quad both[2] = {either(later, theirs, low), either(later, high, theirs)};
            int input = first + tile * 64, limit = p.half ? p.half : p.out;
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                int output = g % 4 + 4 * turn, n = p.half ? group * 8 + output : group * 16 + row * 8 + output;
                if (n >= limit || input >= p.width) continue;
                if (p.half && row) n += p.half;
                u16* to = values_at + (u64)n * p.width + input + (later ? 8 : 0);
                *(Quad*)to = both[turn];
            }
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(256) nvfp4_decode(const __grid_constant__ Parameters p) {
    let_next_kernel_begin();
    int lane = threadIdx.x & 31;
    long long slabs = (long long)p.groups * p.slabs, first = ((long long)blockIdx.x * 8 + (threadIdx.x >> 5)) * TURNS;
    const u8* tiles = p.tiles + (u64)blockIdx.y * slabs * SLAB_BYTES;
    Value* to = (Value*)p.values + (u64)blockIdx.y * p.out * p.width;
    Quad q[TURNS][2] = {};
    u32 scales[TURNS] = {};
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        if (first + i >= slabs) break;
        const u8* at = tiles + (first + i) * SLAB_BYTES;
        scales[i] = *(const u32*)(at + SCALES_OFFSET + lane * 4);
        q[i][0] = load_weights(at + lane * 16), q[i][1] = load_weights(at + TILE_BYTES + lane * 16);
    }
    wait_for_kernels_before();  // the scratch memory may still be read
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (first + i < slabs) store(p, to, first + i, lane, q[i], scales[i]);
}
