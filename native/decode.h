// One weight row decoded to FP32, for instruction sets and operations without a faster way.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

#if !defined(__AVX2__) && !defined(__aarch64__)
// Both values of every packed byte.
struct E2m1Pairs {
  alignas(64) float values[256][2];
};
constexpr E2m1Pairs e2m1_pairs() {
  E2m1Pairs t{};
  for (int i = 0; i < 256; i++) {
    t.values[i][0] = TWICE_E2M1[i & 15] * 0.5f;
    t.values[i][1] = TWICE_E2M1[i >> 4] * 0.5f;
  }
  return t;
}
inline constexpr E2m1Pairs E2M1_PAIRS = e2m1_pairs();

// The four values of the two lowest packed bytes.
INLINED inline vf four_values(uint64_t packed) {
  const float *first = E2M1_PAIRS.values[packed & 255], *second = E2M1_PAIRS.values[packed >> 8 & 255];
#if defined(__SSE2__)
  const __m128d pair = _mm_load_sd(reinterpret_cast<const double*>(first));
  return (vf)_mm_loadh_pd(pair, reinterpret_cast<const double*>(second));
#else
  return vf{first[0], first[1], second[0], second[1]};
#endif
}
#endif

inline void decode_block16(const uint8_t* packed, float scale, float* out) {
#if defined(__AVX2__)
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i low_bits = _mm_set1_epi8(15);
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  __m128i low = _mm_and_si128(bytes, low_bits), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits);
  __m128i values = _mm_shuffle_epi8(table, _mm_unpacklo_epi8(low, high));
  __m256 factor = _mm256_set1_ps(scale * 0.5f);
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)), factor));
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8))), factor));
#elif defined(__aarch64__)
  const uint8x8_t bytes = vld1_u8(packed), low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
  const int8x16_t codes = vreinterpretq_s8_u8(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
  const int8x16_t values = vqtbl1q_s8(vld1q_s8(TWICE_E2M1), vreinterpretq_u8_s8(codes));
  const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(values)), vmovl_high_s8(values)};
  for (int i = 0; i < 2; i++) {
    vst1q_f32(out + i * 8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[i]))), scale * 0.5f));
    vst1q_f32(out + i * 8 + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(halves[i])), scale * 0.5f));
  }
#else
  uint64_t block;
  __builtin_memcpy(&block, packed, 8);
  for (int i = 0; i < 4; i++) store(out + i * 4, four_values(block >> 16 * i) * scale);
#endif
}

#if !defined(__AVX2__)
struct E4m3Values {
  float values[256];
};
constexpr E4m3Values e4m3_values() {
  E4m3Values t{};
  for (int code = 0; code < 256; code++) {
    const int exponent = code >> 3 & 15;
    float value = static_cast<float>((exponent ? 8 : 0) + (code & 7)) * 0.001953125f;
    for (int i = 1; i < exponent; i++) value *= 2;
    if ((code & 127) == 127) value = __builtin_nanf("");
    t.values[code] = code & 128 ? -value : value;
  }
  return t;
}
inline constexpr E4m3Values E4M3_VALUES = e4m3_values();
#endif

#if defined(__SSE2__) && !defined(__AVX2__)
// 16 values of E4M3 times scale by moving their bits, if all have a leading one; else nothing, and false.
INLINED inline bool decode_normal16(const uint8_t* p, vf scale, float* out) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), zero = _mm_setzero_si128();
  const __m128i magnitudes = _mm_and_si128(codes, _mm_set1_epi8(127));
  const __m128i others = _mm_or_si128(
      _mm_cmplt_epi8(magnitudes, _mm_set1_epi8(8)), _mm_cmpeq_epi8(magnitudes, _mm_set1_epi8(127)));
  if (_mm_movemask_epi8(others)) return false;
  const __m128i halves[2] = {_mm_unpacklo_epi8(zero, codes), _mm_unpackhi_epi8(zero, codes)};
  UNROLL for (int i = 0; i < 4; i++) {
    const __m128i top = i % 2 ? _mm_unpackhi_epi16(zero, halves[i / 2]) : _mm_unpacklo_epi16(zero, halves[i / 2]);
    const __m128i bits = _mm_and_si128(_mm_srai_epi32(top, 4), _mm_set1_epi32(static_cast<int>(0x87f00000)));
    store(out + i * 4, (vf)_mm_add_epi32(bits, _mm_set1_epi32(120 << 23)) * scale);
  }
  return true;
}
#endif

// FP32 values [begin, end) of one weight row: begin a multiple of 16.
inline void decode_values(const View& v, int64_t row, int64_t begin, int64_t end, float* out) {
  const uint8_t* values = v.values + row * v.row_bytes;
  if (v.format == NVFP4) {
    const uint8_t* scale = v.scale + row * v.scale_cols;
#if !defined(__AVX2__)
    for (int64_t b = begin / 16; b < end / 16; b++)
      decode_block16(values + b * 8, E4M3_VALUES.values[scale[b]], out + b * 16 - begin);
#else
    for (int64_t b = begin / 16; b < end / 16; b += W) {
      const int64_t count = end / 16 - b < W ? end / 16 - b : W;
      uint8_t codes[W] = {};
      float scales[W];
      __builtin_memcpy(codes, scale + b, count);
      store(scales, from_e4m3(codes));
      for (int64_t i = b; i < b + count; i++) decode_block16(values + i * 8, scales[i - b], out + i * 16 - begin);
    }
#endif
  } else if (v.format == PLAIN) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(values);
    int64_t i = begin;
    for (; i + W <= end; i += W) store(out + i - begin, load_bf16(halves + i));
    for (; i < end; i++) out[i - begin] = from_bf16(halves[i]);
  } else {
    const int64_t width = v.scale ? v.block_cols : v.in;
    for (int64_t i = begin; i < end;) {
      const float scale = block_scale(v, row, i / width);
      const int64_t stop = (i / width + 1) * width < end ? (i / width + 1) * width : end;
#if !defined(__AVX2__)
      const float* table = E4M3_VALUES.values;
      auto decode_some = [&](int64_t last) INLINED {
        for (const uint8_t* p = values + i; i + W <= last; i += W, p += W)
          store(out + i - begin, vf{table[p[0]], table[p[1]], table[p[2]], table[p[3]]} * scale);
      };
#if defined(__SSE2__)
      for (; i + 16 <= stop;) {
        if (__builtin_expect(decode_normal16(values + i, splat(scale), out + i - begin), 1)) i += 16;
        else decode_some(i + 16);
      }
#endif
      decode_some(stop);
#else
      for (; i + W <= stop; i += W) store(out + i - begin, from_e4m3(values + i) * scale);
#endif
      for (; i < stop; i++) out[i - begin] = from_e4m3(values[i]) * scale;
    }
  }
}

// A whole row; the padding to a multiple of 128 is zero.
inline void decode_row(const View& v, int64_t row, float* out) {
  decode_values(v, row, 0, v.in, out);
  for (int64_t i = v.in; i < ceil_div(v.in, 128) * 128; i++) out[i] = 0;
}

}  // namespace
}  // namespace ISA
