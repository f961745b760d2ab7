// Products of NVFP4 weights with activations in CODES, with AVX2: integers up to a block's sum.
//
// 128 weights are two vectors; one shuffle of them takes their blocks' first halves, another the second, so that a block is
// a lane of 4 bytes and 8 block scales are one vector. A table look-up makes bytes of the codes, 12 above twice the value:
// VPMADDUBSW and VPDPBUSD want an unsigned side, and sums start at -12 times the activations' sum.
#pragma once
#include "decode_avx2.h"

namespace ISA {
namespace {

// 128 weights: what meets elements 0 2 4 6 of each block, 1 3 5 7, 8 10 12 14, 9 11 13 15.
INLINED inline void decode_codes(const uint8_t* p, __m256i (&w)[4]) {
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256 first = (__m256)load_bytes(p), second = (__m256)load_bytes(p + 32);
  const __m256i halves[2] = {
      (__m256i)_mm256_shuffle_ps(first, second, 0x88), (__m256i)_mm256_shuffle_ps(first, second, 0xdd)};
  UNROLL for (int h = 0; h < 2; h++) {
    w[2 * h] = _mm256_shuffle_epi8(table, _mm256_and_si256(halves[h], nibble));
    w[2 * h + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(halves[h], 4), nibble));
  }
}

// The sums of 8 blocks' products. A pair's is at most 24 * 127 * 2, a half of a block's fits 16 bits.
INLINED inline __m256 code_sums(const __m256i (&w)[4], const uint8_t* x, const uint8_t* start) {
  __m256i total = load_bytes(start);
#if defined(__AVXVNNI__)
  UNROLL for (int i = 0; i < 4; i++) total = _mm256_dpbusd_avx_epi32(total, w[i], load_bytes(x + i * 32));
#else
  __m256i pairs[4];
  UNROLL for (int i = 0; i < 4; i++) pairs[i] = _mm256_maddubs_epi16(w[i], load_bytes(x + i * 32));
  const __m256i four = _mm256_add_epi16(_mm256_add_epi16(pairs[0], pairs[1]), _mm256_add_epi16(pairs[2], pairs[3]));
  total = _mm256_add_epi32(total, _mm256_madd_epi16(four, _mm256_set1_epi16(1)));
#endif
  return _mm256_cvtepi32_ps(total);
}

// total[r] += 128 inputs of a weight row, the H-th half of a chunk, by R rows of activations whose chunk is at x[r].
template <int R, int H>
INLINED inline void multiply_codes(const uint8_t* p, __m256 scale, const uint8_t* const (&x)[R], __m256 (&total)[R]) {
  __m256i w[4];
  decode_codes(p, w);
  UNROLL for (int r = 0; r < R; r++) {
    const __m256 sums = code_sums(w, x[r] + H * 128, x[r] + CODES_SUM + H * 32);
    const __m256 x_scale = _mm256_loadu_ps(reinterpret_cast<const float*>(x[r] + CODES_SCALE) + H * 8);
    total[r] = _mm256_fmadd_ps(sums, _mm256_mul_ps(scale, x_scale), total[r]);
  }
}

}  // namespace
}  // namespace ISA
