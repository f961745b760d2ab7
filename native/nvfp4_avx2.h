// Products of NVFP4 weights with AVX2: weights become FP32 in registers.
//
// Two table look-ups give the bytes of the values' BF16, which is the upper half of their FP32. They come in the order that
// NIBBLES lays activations out in: of each block of 16 elements 0 2 4 6 1 3 5 7, then 8 10 12 14 9 11 13 15.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

// values[b][h]: half h of block b, of the two blocks at p.
INLINED inline void decode_two_blocks(const uint8_t* p, __m256 (&values)[2][2]) {
  const __m256i high_bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
  const __m256i low_bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i codes =
      _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
  const __m256i high = _mm256_shuffle_epi8(high_bytes, codes), low = _mm256_shuffle_epi8(low_bytes, codes);
  const __m256i block[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
  for (int b = 0; b < 2; b++) {
    values[b][0] = (__m256)_mm256_unpacklo_epi16(_mm256_setzero_si256(), block[b]);
    values[b][1] = (__m256)_mm256_unpackhi_epi16(_mm256_setzero_si256(), block[b]);
  }
}

// Inputs [begin, end) of a weight row, a chunk at most: packed values, and FP32 scales with zeros behind the last.
struct Blocks {
  const uint8_t* values;
  int64_t count;
  float scales[CHUNK / 16];

  Blocks(const View& v, int64_t row, int64_t begin, int64_t end)
      : values(v.values + row * v.row_bytes + begin / 2), count((end - begin) / 16) {
    uint8_t codes[CHUNK / 16] = {};
    __builtin_memcpy(codes, v.scale + row * v.scale_cols + begin / 16, count);
    for (int64_t b = 0; b < CHUNK / 16; b += W) store(scales + b, from_e4m3(codes + b));
  }
};

// sums[r][b % 2] += block b, times R rows of activations in NIBBLES.
template <int R>
inline void nvfp4_blocks(const Blocks& from, const float* const* x, vf* const* sums) {
  __m256 total[R][2];
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 2; b++) total[r][b] = (__m256)sums[r][b];
  alignas(16) uint8_t last[16] = {};
  for (int64_t at = 0; at < from.count; at += 2) {
    const uint8_t* p = from.values + at * 8;
    if (at + 1 == from.count) {
      __builtin_memcpy(last, p, 8);
      p = last;
    }
    __m256 w[2][2];
    decode_two_blocks(p, w);
    for (int b = 0; b < 2; b++) {
      const __m256 scale = _mm256_broadcast_ss(from.scales + at + b);
      for (int r = 0; r < R; r++) {
        const float* v = x[r] + (at + b) * 16;
        const __m256 t = _mm256_fmadd_ps(w[b][1], _mm256_loadu_ps(v + 8), _mm256_mul_ps(w[b][0], _mm256_loadu_ps(v)));
        total[r][b] = _mm256_fmadd_ps(t, scale, total[r][b]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 2; b++) sums[r][b] = (vf)total[r][b];
}

// For many rows: values times scales, once, in NIBBLES.
inline void decode_nibbles(const View& v, int64_t row, int64_t begin, int64_t end, float* out) {
  const Blocks from(v, row, begin, end);
  for (int64_t b = 0; b < from.count; b++) {
    uint8_t packed[16] = {};
    __builtin_memcpy(packed, from.values + b * 8, 8);
    __m256 w[2][2];
    decode_two_blocks(packed, w);
    for (int h = 0; h < 2; h++)
      _mm256_storeu_ps(out + b * 16 + h * 8, _mm256_mul_ps(w[0][h], _mm256_set1_ps(from.scales[b])));
  }
}

// sums[r * stride + b % 2] += the blocks of a weight row by all rows of activations, 4 at a time.
inline void nvfp4_blocks_by_rows(
    const View& v, int64_t row, int64_t begin, int64_t end, const Rows& rows, vf* sums, int64_t stride) {
  const Blocks from(v, row, begin, end);
  for (int64_t r = 0; r < rows.count; r += 4) {
    const int64_t count = rows.count - r < 4 ? rows.count - r : 4;
    const float* x[4];
    vf* of[4];
    for (int64_t i = 0; i < count; i++) {
      x[i] = reinterpret_cast<const float*>(rows.at(r + i) + begin / CHUNK * rows.step);
      of[i] = sums + (r + i) * stride;
    }
    if (count == 4) nvfp4_blocks<4>(from, x, of);
    else if (count == 3) nvfp4_blocks<3>(from, x, of);
    else if (count == 2) nvfp4_blocks<2>(from, x, of);
    else nvfp4_blocks<1>(from, x, of);
  }
}

}  // namespace
}  // namespace ISA
