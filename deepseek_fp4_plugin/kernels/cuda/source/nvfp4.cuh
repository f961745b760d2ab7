// NVFP4 weights in tiles; kernels/cuda/tiles.py says how they are laid out.
//
// A slab is 16 outputs by 128 inputs, 1152 bytes: two tiles of 64 inputs, in each 16 bytes a lane, then 4 scale bytes a
// lane. Lane 4 g + i holds the i-th block of 16 inputs of outputs g and g + 8. The order of inputs within a product is
// free as long as both sides agree, so four products of 16 inputs take four values of every lane's block in turn:
// a lane's own activations are then 32 bytes that lie together.
#pragma once
#include "device.cuh"

constexpr int SLAB_BYTES = 1152;
constexpr int SLAB_INPUTS = 128;
constexpr int TILE_BYTES = 512;
constexpr int SCALES_OFFSET = 1024;

// Four pairs of E2M1 values lie in a word so that one mask finds a pair where BF16 has its sign, its two lowest exponent
// bits and its highest mantissa bit: values are then off by 2^126, which the scale makes up for.
constexpr u32 PAIR = 0x81C081C0;

__device__ inline u32 pair(u32 word, int index, u32 scale) {
    u32 bits;
    if (index == 0) bits = word & PAIR;
    else if (index == 1) bits = (word << 3) & PAIR;
    else if (index == 2) bits = (word << 6) & PAIR;
    else bits = ((word << 1) & 0x80008000) | (((word >> 5) & 0x01000100) | ((word >> 4) & 0x00C000C0));
    return multiply_bf16(bits, scale);
}

// Byte `index` of `word`, five exponent and three mantissa bits, as a pair of BF16: the block scale times 2^110. Values
// times it are the weights (without the tensor scale) times 2^-16.
__device__ inline u32 block_scale(u32 word, int index) {
    u32 bytes;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "r"(0x4040u + 0x0101u * (u32)index));
    return bytes * 16 + 0x6E806E80;
}

// Outputs g and g + 8 of one tile times a lane's 16 activations of each column: four products.
// Few columns have two sums, of even and odd products: with one a product would wait for the one before.
template <int COLUMNS>
constexpr int CHAINS = COLUMNS <= 2 ? 2 : 1;

template <int COLUMNS>
__device__ inline void multiply_tile(float (&sums)[CHAINS<COLUMNS>][COLUMNS][4], Quad weights, u32 scales, int tile,
                                     const Quad (&x)[COLUMNS][2]) {
    u32 upper = block_scale(scales, 2 * tile), lower = block_scale(scales, 2 * tile + 1);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        u32 high = step < 2 ? weights.x : weights.y, low = step < 2 ? weights.z : weights.w;
        int first = 2 * (step & 1);
        u32 a[4] = {pair(high, first, upper), pair(low, first, lower), pair(high, first + 1, upper),
                    pair(low, first + 1, lower)};
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            const Quad& q = x[column][step >> 1];
            mma(sums[step % CHAINS<COLUMNS>][column], a, step & 1 ? q.z : q.x, step & 1 ? q.w : q.y);
        }
    }
}
