// Absorbed latent attention over the paged cache: what its kernels share.
//
// LATENT, ROPE: widths.
#pragma once
#include "device.cuh"

struct Parameters {
    const u16* q_latent;         // [tokens][heads][LATENT], strides in values
    const u16* q_rope;           // [tokens][heads][ROPE]
    const u8* cache;             // [blocks][block_size][WIDTH]
    const long long* tables;     // [requests][table_stride]
    const long long* starts;     // [requests + 1], first token of each
    const long long* contexts;   // [requests]
    u16* y;                      // [tokens][heads][LATENT]
    float* parts;                // [clusters][tokens * heads][LATENT], each normalised; unused where there is one
    float* sums;                 // [clusters][tokens * heads], base-2 logarithm of each part's sum of exponentials
    int latent_token, latent_head, rope_token, rope_head;
    int heads, block_size, table_stride, splits, rows;  // splits: blocks of a context, a multiple of CLUSTER.  rows: tokens * heads
    float scale;  // times log2(e)
};

constexpr int WIDTH = LATENT + ROPE;

// Four E4M3 values to BF16.
__device__ inline void decode_fp8(u32 word, u32& low, u32& high) {
    u32 halves[2];
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(halves[0]), "=r"(halves[1])
        : "r"(word));
    u32 result[2];
    for (int i = 0; i < 2; i++) {
        float a, b;
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
            : "=f"(a), "=f"(b)
            : "r"(halves[i]));
        result[i] = pack_bf16(a, b);
    }
    low = result[0], high = result[1];
}
