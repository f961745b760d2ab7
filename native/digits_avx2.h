// BF16 activations as integers, with AVX2 and without rounding: 24 bits in three bytes, with a power of two a block of 16.
//
// A byte product of VPMADDUBSW or VPDPBUSD costs a quarter of an FP32 one, and weights need not become FP32: three of them are
// cheaper. BF16 has 8 significant bits, so 24 hold whatever is at least 2^-15 of its block's largest value, and of smaller
// values those with zeros at the end. Where a block of 128 inputs has other ones, or infinity or NaN, it stays FP32.
#pragma once
#include "rounding.h"

namespace ISA {
namespace {

// DIGITS, a half of a chunk in 512 bytes. Either its half of QUARTERS (see operand.h), or the digits of its 8 blocks' integers,
// base 256, from -128 on: for the last, the middle and the first digit four vectors, a block a lane, in the order of CODES.
// Behind them the blocks' powers of two, FP32, and -12 times the sums of their integers, int32, both in that order. Behind
// both halves an int32 for each: -1 if it is digits, or 0.
constexpr int64_t HALF_BYTES = 512, DIGITS_SCALE = 384, DIGITS_SUM = 416;
constexpr int64_t DIGITS_KIND = 2 * HALF_BYTES, DIGITS_BYTES = DIGITS_KIND + 64;

INLINED inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

#if !defined(__AVXVNNI__)
// Sums of 8 products, two a block: bytes of 0 to 24 in w by the four vectors at x. A pair's is at most 24 * 128 * 2, four of
// them fit 16 bits.
INLINED inline __m256i half_sums(const __m256i (&w)[4], const uint8_t* x) {
  __m256i pairs[4];
  UNROLL for (int i = 0; i < 4; i++) pairs[i] = _mm256_maddubs_epi16(w[i], load_bytes(x + i * 32));
  return _mm256_add_epi16(_mm256_add_epi16(pairs[0], pairs[1]), _mm256_add_epi16(pairs[2], pairs[3]));
}
#endif

// start plus 8 blocks' sums of 16 products.
INLINED inline __m256i byte_products(const __m256i (&w)[4], const uint8_t* x, __m256i start) {
#if defined(__AVXVNNI__)
  UNROLL for (int i = 0; i < 4; i++) start = _mm256_dpbusd_avx_epi32(start, w[i], load_bytes(x + i * 32));
  return start;
#else
  return _mm256_add_epi32(start, _mm256_madd_epi16(half_sums(w, x), _mm256_set1_epi16(1)));
#endif
}

// The same by the integers that the digits at x mean. Modulo 2^32: the sum of 16 products by -12 to 12 is below 2^31.
INLINED inline __m256i digit_products(const __m256i (&w)[4], const uint8_t* x, __m256i start) {
#if defined(__AVXVNNI__)
  const __m256i first = _mm256_slli_epi32(byte_products(w, x + 256, _mm256_setzero_si256()), 8);
#else
  const __m256i first = _mm256_madd_epi16(half_sums(w, x + 256), _mm256_set1_epi16(256));
#endif
  return _mm256_add_epi32(byte_products(w, x, start), _mm256_slli_epi32(byte_products(w, x + 128, first), 8));
}

// One block of 16 FP32 values, BF16 ones, whose lane's last digits are at `out`. Returns half its power of two, since weights
// are taken twice, or NaN where digits do not hold it.
inline float block_digits(const float* x, uint8_t* out) {
  const __m256 values[2] = {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i eight = _mm256_max_epi32(
      _mm256_and_si256((__m256i)values[0], magnitude), _mm256_and_si256((__m256i)values[1], magnitude));
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  if (bits == 0) return 0.0f;
  // Of the BF16 above the largest, so that its first digit is at most 127.
  const int32_t exponent = static_cast<int32_t>((static_cast<uint32_t>(bits) + 0x10000) >> 23);
  if (exponent < 64 || exponent > 254) return __builtin_nanf("");
  const __m256 factor = (__m256)_mm256_set1_epi32((276 - exponent) << 23);
  const __m256 scale = (__m256)_mm256_set1_epi32((exponent - 22) << 23);
  const __m256i bias = _mm256_set1_epi32(0x808080);
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, -128, -128, -128, -128));
  __m256 same = (__m256)_mm256_set1_epi32(-1);
  for (int h = 0; h < 2; h++) {
    const __m256i integers = _mm256_cvtps_epi32(_mm256_mul_ps(values[h], factor));
    same = _mm256_and_ps(
        same, _mm256_cmp_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(integers), scale), values[h], _CMP_EQ_OQ));
    const __m256i digits = _mm256_xor_si256(_mm256_add_epi32(integers, bias), bias);
    const __m256i pairs = _mm256_shuffle_epi8(digits, order);  // of each digit: even elements, odd elements
    const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
    alignas(16) int32_t quarters[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(quarters), _mm_unpacklo_epi16(low, high));
    _mm_store_si128(reinterpret_cast<__m128i*>(quarters + 4), _mm_unpackhi_epi16(low, high));
    for (int i = 0; i < 6; i++) __builtin_memcpy(out + i / 2 * 128 + h * 64 + i % 2 * 32, quarters + i, 4);
  }
  return _mm256_movemask_ps(same) == 255 ? 0.5f * _mm256_cvtss_f32(scale) : __builtin_nanf("");
}

// 128 FP32 values, BF16 ones, as digits at `out`; what is there is lost. Returns whether digits hold them.
inline bool half_digits(const float* x, uint8_t* out) {
  __builtin_memset(out, 0, HALF_BYTES);
  for (int64_t b = 0; b < 8; b++) {
    const float scale = block_digits(x + b * 16, out + lane_of(b) * 4);
    if (scale != scale) return false;
    __builtin_memcpy(out + DIGITS_SCALE + lane_of(b) * 4, &scale, 4);
  }
  const __m256i twelve = _mm256_set1_epi8(12), zero = _mm256_setzero_si256(), w[4] = {twelve, twelve, twelve, twelve};
  const __m256i sums = _mm256_sub_epi32(zero, digit_products(w, out, zero));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + DIGITS_SUM), sums);
  return true;
}

}  // namespace
}  // namespace ISA
