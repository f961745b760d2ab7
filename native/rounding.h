// Activations as integers with a scale a block of 16: the values of FP4 twice, or 8 bits.
//
// Twice an E2M1 weight is an integer of at most 12, so with either a block's sum of products is an exact integer.
#pragma once
#include "simd.h"

namespace ISA {
namespace {

// CODES, the order of integers in a chunk of 256 (see operand.h): of every block of 16 the elements 0 2 4 6 lie together,
// then 1 3 5 7, then 8 10 12 14, then 9 11 13 15, where the low and high nibbles of a weight's dwords meet them. A vector
// has a dword of each of its blocks, in the order that two shuffles of as many packed weights put them in. FP32 block
// scales follow, and -12 times the sum of a block's integers, int32, both in the order of the blocks' dwords.
constexpr int64_t CHUNK = 256;  // elements
constexpr int64_t CODES_BYTES = 384, CODES_SCALE = 256, CODES_SUM = 320;
#if defined(__AVX512F__)
constexpr int64_t CODES_BLOCKS = 16;  // whose dwords are a vector
constexpr int64_t lane_of(int64_t block) { return (block & 1) | (block & 8) >> 2 | (block & 6) << 1; }
#else
constexpr int64_t CODES_BLOCKS = 8;
constexpr int64_t lane_of(int64_t block) { return (block & 9) | (block & 2) << 1 | (block & 4) >> 1; }
#endif

inline constexpr int8_t TWICE_E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The nearest E2M1 codes 0 .. 15; a NaN's is 7.
inline vi e2m1_codes(vf q) {
  const vf m = (vf)((vi)q & 0x7fffffff);
  // Midpoints between neighbouring values; a tie goes to the even code. A comparison gives 0 or -1.
  vi code = -((m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.0f));
  code |= (m != m) & 7;
  return code | ((q < 0.0f) & 8);
}

// Rounds one block of 16 to FP4, as numerics/nvfp4.py does operation by operation. codes: 0 .. 15. Returns the E4M3
// scale's byte.
inline uint8_t quantize_block(const float* x, float input_scale, int32_t* codes) {
  const float global_factor = 1.0f / input_scale;
  vf largest{};
  vi nan{};
  for (int i = 0; i < 16; i += W) {
    vf magnitude = (vf)((vi)load(x + i) & 0x7fffffff);
    nan |= magnitude != magnitude;
    largest = maximum(largest, magnitude);
  }
  float scale = maximum_lane(largest) * (global_factor * 0.16666666666666666f);
  scale = scale > 448.0f ? 448.0f : scale;
  if (any(nan)) scale = __builtin_nanf("");
  const uint8_t byte = to_e4m3(scale);
  float out_scale = 1.0f / (from_e4m3(byte) * (1.0f / global_factor));
  out_scale = out_scale > 3.4028234663852886e38f ? 3.4028234663852886e38f : out_scale;
  for (int i = 0; i < 16; i += W) {
    const vi code = e2m1_codes(load(x + i) * out_scale);
    __builtin_memcpy(codes + i, &code, sizeof(code));
  }
  return byte;
}

// The same to integers of 8 bits, as numerics/int8.py does operation by operation. Returns the scale: NaN for a block
// with a value that is not finite.
inline float int8_block(const float* x, int32_t* integers) {
  vf largest{};
  vi nan{};
  for (int i = 0; i < 16; i += W) {
    const vf magnitude = (vf)((vi)load(x + i) & 0x7fffffff);
    nan |= magnitude != magnitude;
    largest = maximum(largest, magnitude);
  }
  const float amax = maximum_lane(largest);
  const bool finite = !any(nan) && amax <= 3.4028234663852886e38f;
  if (!finite || amax < 7.888609052210118e-31f) {  // 2^-100
    __builtin_memset(integers, 0, 64);
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float inverse = 127.0f / amax;
  for (int i = 0; i < 16; i += W) {
    const vi rounded = (vi)(load(x + i) * inverse + 12582912.0f) - 0x4B400000;  // 1.5 * 2^23: ties to even
    __builtin_memcpy(integers + i, &rounded, sizeof(rounded));
  }
  return amax / 127.0f;
}

// A block's FP4 codes or integers, and its scale.
inline float round_block(const float* x, const Weight& weight, int32_t* codes) {
  if (weight.activations == AS_INT8) return int8_block(x, codes);
  return from_e4m3(quantize_block(x, weight.input_scale, codes));
}

// One chunk as the FP32 values that the integers mean: n <= CHUNK values.
inline void round_values(const float* x, int64_t n, const Weight& weight, float* out) {
  for (int64_t b = 0; b * 16 < n; b++) {
    int32_t codes[16];
    const float scale = round_block(x + b * 16, weight, codes);
    for (int i = 0; i < 16; i++)
      out[b * 16 + i] = weight.activations == AS_FP4 ? TWICE_E2M1[codes[i]] * 0.5f * scale : codes[i] * scale;
  }
}

#if defined(__AVX2__)
// One chunk in CODES: n <= CHUNK values, into zeroed memory.
inline void prepare_codes(const float* x, int64_t n, const Weight& weight, uint8_t* out) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m128i twice = _mm_loadu_si128(reinterpret_cast<const __m128i*>(TWICE_E2M1));
  for (int64_t b = 0; b * 16 < n; b++) {
    alignas(64) int32_t codes[16];
    const int64_t at = lane_of(b);
    reinterpret_cast<float*>(out + CODES_SCALE)[at] = round_block(x + b * 16, weight, codes);
#if defined(__AVX512F__)
    __m128i bytes = _mm512_cvtepi32_epi8(_mm512_load_si512(codes));
#else
    const __m256i* halves = reinterpret_cast<const __m256i*>(codes);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(halves[0], halves[1]), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#endif
    if (weight.activations == AS_FP4) bytes = _mm_shuffle_epi8(twice, bytes);
    alignas(16) int32_t quarters[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(quarters), _mm_shuffle_epi8(bytes, order));
    uint8_t* to = out + at / CODES_BLOCKS * CODES_BLOCKS * 16 + at % CODES_BLOCKS * 4;
    for (int i = 0; i < 4; i++) __builtin_memcpy(to + i * CODES_BLOCKS * 4, quarters + i, 4);
  }
  const __m256i twelve = _mm256_set1_epi8(12), minus = _mm256_set1_epi16(-1);
  for (int64_t v = 0; v < 2; v++) {  // 8 lanes
    const uint8_t* from = out + v * (CODES_BLOCKS == 8 ? 128 : 32);
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      const __m256i* codes = reinterpret_cast<const __m256i*>(from + i * CODES_BLOCKS * 4);
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(twelve, _mm256_loadu_si256(codes)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + CODES_SUM) + v, _mm256_madd_epi16(sums, minus));
  }
}
#endif

}  // namespace
}  // namespace ISA
