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

// A pair of E2M1 values belongs where BF16 has its sign, its two lowest exponent bits and its highest mantissa bit: values
// are then off by 2^126, which the scale makes up for. A block's two words hold three pairs each so that one rotation
// and one mask find them, and what these leave free of both words, put together, holds two more.
constexpr u32 PAIR = 0x81C081C0;
constexpr u32 FREE_OF_FIRST = 0x06030603;

__device__ inline u32 rotated(u32 word, int by) { return __funnelshift_l(word, word, by); }

// The 16 values of a block, times its scale. Shifts that lose no bit of a pair are not rotations: these take another pipe.
__device__ inline void decode_block(u32 (&pairs)[8], u32 first, u32 second, u32 scale) {
    u32 both;  // where FREE_OF_FIRST has ones from `first`, elsewhere from `second`: one instruction, not two
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(both) : "r"(first), "r"(second), "r"(FREE_OF_FIRST));
    u32 bits[8] = {first,       first << 4,           rotated(first, 10), second << 2, rotated(second, 8),
                   rotated(second, 14), both << 6, rotated(both, 12)};
#pragma unroll
    for (int i = 0; i < 8; i++) pairs[i] = multiply_bf16(bits[i] & PAIR, scale);
}

// Byte `index` of `word`, five exponent and three mantissa bits, as a pair of BF16: the block scale times 2^110. Values
// times it are the weights (without the tensor scale) times 2^-16.
__device__ inline u32 block_scale(u32 word, int index) {
    u32 bytes;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "r"(0x4040u + 0x0101u * (u32)index));
    return bytes * 16 + 0x6E806E80;
}

// The two scales of a lane in one tile, of outputs g and g + 8: a pair, whose halves the multiplications take as they lie.
__device__ inline u32 block_scales(u32 word, int tile) {
    u32 bytes;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "r"(0x4140u + 0x0202u * (u32)tile));
    return bytes * 16 + 0x6E806E80;
}

template <int HALF>
__device__ inline u32 both(u32 pair) {
    u32 equal;
    asm("{\n.reg .b16 half<2>;\nmov.b32 {half0, half1}, %1;\nmov.b32 %0, {half%2, half%2};\n}" : "=r"(equal) : "r"(pair), "n"(HALF));
    return equal;
}

// Outputs g and g + 8 of a tile in a lane.
__device__ inline void decode_codes(u32 (&upper)[8], u32 (&lower)[8], const Quad& codes, u32 scales, int tile) {
    u32 pair = block_scales(scales, tile);
    decode_block(upper, codes.x, codes.y, both<0>(pair));
    decode_block(lower, codes.z, codes.w, both<1>(pair));
}

// Outputs g and g + 8 of one tile times a lane's 16 activations of each column: four products.
// Few columns have two sums, of even and odd products: with one a product would wait for the one before.
template <int COLUMNS>
constexpr int CHAINS = COLUMNS <= 2 ? 2 : 1;

template <int COLUMNS, int SUMS>
__device__ inline void multiply_tile(float (&sums)[SUMS][COLUMNS][4], Quad weights, u32 scales, int tile,
                                     const Quad (&x)[COLUMNS][2]) {
    u32 upper[8], lower[8];
    decode_codes(upper, lower, weights, scales, tile);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        u32 a[4] = {upper[2 * step], lower[2 * step], upper[2 * step + 1], lower[2 * step + 1]};
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            const Quad& q = x[column][step >> 1];
            mma(sums[step % SUMS][column], a, step & 1 ? q.z : q.x, step & 1 ? q.w : q.y);
        }
    }
}

// Outputs g and g + 8 of one tile in the matrix unit's registers, for four products of 16 inputs.
__device__ inline void decode_tile(u32 (&a)[4][4], u32 tile, u32 scales_at, int index) {
    Quad codes = shared_quad(tile);
    u32 scales = shared_word(scales_at), upper[8], lower[8];
    decode_codes(upper, lower, codes, scales, index);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        a[step][0] = upper[2 * step], a[step][1] = lower[2 * step];
        a[step][2] = upper[2 * step + 1], a[step][3] = lower[2 * step + 1];
    }
}

// The same as E4M3 for two products of 32 inputs: eight of every lane's block in turn. Values are the weights (without the
// tensor scale) times 2^-7, rounded: the smaller the exponent, the more of them lose bits; with a larger one the scale, which
// makes up for 2^126, would be no BF16 number.
__device__ inline void decode_tile_fp8(u32 (&a)[2][4], u32 tile, u32 scales_at, int index) {
    constexpr u32 TIMES_512 = 9 << 23 | 9 << 7;
    Quad codes = shared_quad(tile);
    u32 scales = shared_word(scales_at), upper[8], lower[8];
    decode_block(upper, codes.x, codes.y, block_scale(scales, 2 * index) + TIMES_512);
    decode_block(lower, codes.z, codes.w, block_scale(scales, 2 * index + 1) + TIMES_512);
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int pair = 4 * step + 2 * half;
            a[step][2 * half] = to_fp8(upper[pair]) | (u32)to_fp8(upper[pair + 1]) << 16;
            a[step][2 * half + 1] = to_fp8(lower[pair]) | (u32)to_fp8(lower[pair + 1]) << 16;
        }
}
