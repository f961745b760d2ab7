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

// total[r] += 128 inputs of a weight row, the H-th half of a chunk, by R rows of activations whose chunk is at x[r].
template <int R, int H>
INLINED inline void multiply_codes(const uint8_t* p, __m256 scale, const uint8_t* const (&x)[R], __m256 (&total)[R]) {
  __m256i w[4];
  decode_codes(p, w);
  UNROLL for (int r = 0; r < R; r++) {
    const __m256i sums = byte_products(w, x[r] + H * 128, load_bytes(x[r] + CODES_SUM + H * 32));
    const __m256 x_scale = _mm256_loadu_ps(reinterpret_cast<const float*>(x[r] + CODES_SCALE) + H * 8);
    total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(scale, x_scale), total[r]);
  }
}

// The same where a half is digits, which begin at x[r].
template <int R>
INLINED inline void multiply_digits(const uint8_t* p, __m256 scale, const uint8_t* const (&x)[R], __m256 (&total)[R]) {
  __m256i w[4];
  decode_codes(p, w);
  UNROLL for (int r = 0; r < R; r++) {
    if (R > 1) asm volatile("" ::: "memory");  // GCC would mix the rows until registers run out
    const __m256i sums = digit_products(w, x[r], load_bytes(x[r] + DIGITS_SUM));
    const __m256 x_scale = _mm256_loadu_ps(reinterpret_cast<const float*>(x[r] + DIGITS_SCALE));
    total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(scale, x_scale), total[r]);
  }
}

__attribute__((noinline)) inline __m256 one_row_of_digits(const uint8_t* p, __m256 scale, const uint8_t* x, __m256 total) {
  const uint8_t* const only[1] = {x};
  __m256 totals[1] = {total};
  multiply_digits(p, scale, only, totals);
  return totals[0];
}

}  // namespace
}  // namespace ISA
