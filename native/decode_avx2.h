// Decoding in registers with AVX2: weights become vectors of FP32, in the order that activations are laid out in.
//
// A BF16 is the upper half of an FP32, so a vector of BF16 becomes two of FP32: its even elements by a shift, its odd ones by
// a mask. NVFP4 and FP8 become BF16 first.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

// Even and odd elements of 16 BF16.
INLINED inline __m256 even_halves(__m256i x) { return (__m256)_mm256_slli_epi32(x, 16); }
INLINED inline __m256 odd_halves(__m256i x) {
  return (__m256)_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
}

// 16 block scales, E4M3, as FP32 times 2^-8: their bits are those of an FP16 number. They come in the order 0 1 4 5 2 3 6 7
// 8 9 12 13 10 11 14 15, for two_scales().
constexpr float SCALE_SHIFT = 256.0f;
INLINED inline void decode_scales(__m128i bytes, __m256 (&scales)[2]) {
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i words = _mm256_and_si256(
      _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order)), 7),
      _mm256_set1_epi16(static_cast<short>(0xbf80)));
  scales[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
  scales[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
}
INLINED inline void decode_scales(const uint8_t* p, __m256 (&scales)[2]) {
  decode_scales(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), scales);
}

// The first `count` block scales of fewer than 16, with zeros behind them: put together in registers, since a vector that is
// read from memory would wait for bytes that were just written there.
INLINED inline __m128i some_scales(const uint8_t* p, int64_t count) {
  const __m128i eight = count < 8 ? _mm_setzero_si128() : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if (count % 8 == 0) return eight;
  uint64_t rest = 0;
  for (int64_t i = 0; i < count % 8; i++) rest |= static_cast<uint64_t>(p[count / 8 * 8 + i]) << (i * 8);
  const __m128i others = _mm_cvtsi64_si128(static_cast<int64_t>(rest));
  return count < 8 ? others : _mm_unpacklo_epi64(eight, others);
}

// Of a chunk with n inputs.
INLINED inline __m128i chunk_scales(const uint8_t* p, int64_t n) {
  return n == CHUNK ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : some_scales(p, n / 16);
}

// Of 8 blocks' scales those of 4 I + H and 4 I + H + 2, four lanes each.
template <int I, int H>
INLINED inline __m256 two_scales(__m256 scales) {
  return _mm256_permute_ps(scales, (I * 2 + H) * 0x55);
}

// use(h, j, w) with 64 values of NVFP4, without their scales: h * 32 + j * 8 is where the 8 in w lie in QUARTERS. Two table
// look-ups give their BF16's upper and lower bytes.
template <class Use>
INLINED inline void each_nvfp4(const uint8_t* p, const Use& use) {
  const __m256i high_bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
  const __m256i low_bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
  const __m256i packed = load_bytes(p);
  each<2>([&](auto odd) INLINED {
    const __m256i codes = _mm256_and_si256(odd ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15));
    const __m256i high = _mm256_shuffle_epi8(high_bytes, codes), low = _mm256_shuffle_epi8(low_bytes, codes);
    each<2>([&](auto h) INLINED {
      const __m256i halves = h ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
      use(h, Number<2 * odd>(), even_halves(halves));
      use(h, Number<2 * odd + 1>(), odd_halves(halves));
    });
  });
}
INLINED inline void decode_nvfp4(const uint8_t* p, __m256 (&w)[2][4]) {
  each_nvfp4(p, [&](auto h, auto j, __m256 values) INLINED { w[h][j] = values; });
}

// 32 of E4M3 as BF16 in their order. The upper half of a code gives sign and exponent but for its last bit, that is the
// upper byte; the lower half is the upper part of the lower byte. Codes below 2^-6 have no leading one and need others.
INLINED inline void fp8_halves(const uint8_t* p, __m256i (&halves)[2]) {
  auto table = [](__m128i x) INLINED { return _mm256_broadcastsi128_si256(x); };
  const __m256i upper =
      table(_mm_setr_epi8(60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61));
  const __m256i no_small = table(_mm_setr_epi8(0, -1, -1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1));
  const __m256i small_upper = table(_mm_setr_epi8(60, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i small_lower = table(_mm_setr_epi8(0, 16, -96, -16, 64, 112, 32, 16, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i bytes = _mm256_permute4x64_epi64(load_bytes(p), 0xd8), nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(bytes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
  const __m256i small = _mm256_or_si256(low, _mm256_shuffle_epi8(no_small, high));  // no index where it is none
  const __m256i nan = _mm256_cmpeq_epi8(_mm256_or_si256(bytes, _mm256_set1_epi8(-128)), _mm256_set1_epi8(-1));
  const __m256i first = _mm256_or_si256(
      _mm256_xor_si256(_mm256_shuffle_epi8(upper, high), _mm256_shuffle_epi8(small_upper, small)), nan);
  const __m256i second = _mm256_xor_si256(_mm256_slli_epi16(low, 4), _mm256_shuffle_epi8(small_lower, small));
  halves[0] = _mm256_unpacklo_epi8(second, first);
  halves[1] = _mm256_unpackhi_epi8(second, first);
}

// The same of normal numbers: sign, exponent and mantissa only move.
INLINED inline void normal_fp8_halves(const uint8_t* p, __m256i (&halves)[2]) {
  UNROLL for (int h = 0; h < 2; h++) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + h * 16)));
    const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(words, 4), _mm256_set1_epi16(static_cast<short>(0x87f0)));
    halves[h] = _mm256_add_epi16(moved, _mm256_set1_epi16(120 << 7));
  }
}

// Whether N of E4M3 are normal numbers, with a leading one, as nearly always in weights. Twice the code after it, without
// the sign, is 0 after a NaN's and 2 to 16 after those of zero and subnormal ones.
template <int N>
INLINED inline bool are_normal(const uint8_t* p) {
  __m256i least = _mm256_set1_epi8(-1);
  UNROLL for (int i = 0; i < N; i += 32) {
    const __m256i next = _mm256_add_epi8(load_bytes(p + i), _mm256_set1_epi8(1));
    least = _mm256_min_epu8(least, _mm256_add_epi8(next, next));
  }
  const __m256i others = _mm256_subs_epu8(_mm256_set1_epi8(17), least);
  return _mm256_testz_si256(others, others);
}

// 32 of E4M3 in PAIRS.
template <bool NORMAL>
INLINED inline void decode_fp8(const uint8_t* p, __m256 (&w)[4]) {
  __m256i halves[2];
  if (NORMAL) normal_fp8_halves(p, halves);
  else fp8_halves(p, halves);
  UNROLL for (int h = 0; h < 2; h++) {
    w[2 * h] = even_halves(halves[h]);
    w[2 * h + 1] = odd_halves(halves[h]);
  }
}

// 32 of BF16 in PAIRS.
INLINED inline void decode_plain(const uint8_t* p, __m256 (&w)[4]) {
  UNROLL for (int h = 0; h < 2; h++) {
    const __m256i halves = load_bytes(p + h * 32);
    w[2 * h] = even_halves(halves);
    w[2 * h + 1] = odd_halves(halves);
  }
}

inline Layout dot_layout(const Weight& weight) {
  return weight.format != NVFP4 ? PAIRS : weight.activations == AS_BF16 ? DIGITS : CODES;
}

// Weights at the end of a row, or between scale blocks that share a step, among zeros.
struct Padded {
  alignas(32) uint8_t bytes[CHUNK / 2] = {};
  uint8_t scale[CHUNK / 16] = {};

  Padded(const uint8_t* p, int64_t size, int64_t at = 0) { __builtin_memcpy(bytes + at, p, size); }
  Padded(const uint8_t* p, const uint8_t* scales, int64_t blocks) : Padded(p, blocks * 8) {
    __builtin_memcpy(scale, scales, blocks);
  }
};

// A chunk of NVFP4, with its scales times 2^-8, in QUARTERS.
inline void decode_nvfp4_chunk(const uint8_t* p, const uint8_t* scale, float* out) {
  __m256 scales[2], w[2][4];
  decode_scales(scale, scales);
  each<4>([&](auto i) INLINED {
    decode_nvfp4(p + i * 32, w);
    each<2>([&](auto h) INLINED {
      UNROLL for (int j = 0; j < 4; j++)
        _mm256_storeu_ps(out + i * 64 + h * 32 + j * 8, _mm256_mul_ps(w[h][j], two_scales<i % 2, h>(scales[i / 2])));
    });
  });
}

// A chunk of one weight row, in the activations' layout and with its scales, but for decoded_factor(); zeros behind the end.
inline void decode_chunk(const View& v, int64_t row, int64_t chunk, float* out) {
  const uint8_t* p = v.values + row * v.row_bytes;
  const int64_t begin = chunk * CHUNK, left = v.in - begin < CHUNK ? v.in - begin : CHUNK;
  if (v.format == NVFP4) {
    const uint8_t* scale = v.scale + row * v.scale_cols + begin / 16;
    if (left == CHUNK) return decode_nvfp4_chunk(p + begin / 2, scale, out);
    const Padded padded(p + begin / 2, scale, left / 16);
    return decode_nvfp4_chunk(padded.bytes, padded.scale, out);
  }
  const int64_t size = v.format == PLAIN ? 2 : 1, width = v.scale ? v.block_cols : v.in;
  if (left < CHUNK) __builtin_memset(out, 0, CHUNK * 4);
  for (int64_t k = 0; k < left; k += 32) {
    const int64_t count = left - k < 32 ? left - k : 32, block = (begin + k) / width;
    const bool together = (block + 1) * width >= begin + k + count;  // in one scale block
    const __m256 scale = _mm256_set1_ps(together ? block_scale(v, row, block) : 1.0f);
    auto decode = [&](const uint8_t* from) INLINED {
      __m256 w[4];
      if (v.format == PLAIN) decode_plain(from, w);
      else if (__builtin_expect(are_normal<32>(from), 1)) decode_fp8<true>(from, w);
      else decode_fp8<false>(from, w);
      UNROLL for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + k + i * 8, _mm256_mul_ps(w[i], scale));
    };
    if (count == 32) decode(p + (begin + k) * size);
    else decode(Padded(p + (begin + k) * size, count * size).bytes);
    for (int64_t i = 0; i < count && !together; i++)
      out[k + i / 16 * 16 + i % 2 * 8 + i % 16 / 2] *= block_scale(v, row, (begin + k + i) / width);
  }
}

// N values of E4M3, a multiple of 32, as BF16, in their order.
template <bool NORMAL, int N>
INLINED inline void store_fp8_halves(const uint8_t* from, uint16_t* to) {
  UNROLL for (int i = 0; i < N; i += 32) {
    __m256i halves[2];
    if (NORMAL) normal_fp8_halves(from + i, halves);
    else fp8_halves(from + i, halves);
    UNROLL for (int h = 0; h < 2; h++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i + h * 16), halves[h]);
  }
}

// n values of E4M3 as BF16, in their order.
inline void decode_e4m3(const uint8_t* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) store_fp8_halves<false, 32>(from + i, to + i);
  for (; i < n; i++) to[i] = to_bf16(from_e4m3(from[i]));
}

// The same of weights, most of which are normal numbers.
inline void decode_fp8_row(const uint8_t* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    if (__builtin_expect(are_normal<128>(from + i), 1)) store_fp8_halves<true, 128>(from + i, to + i);
    else store_fp8_halves<false, 128>(from + i, to + i);
  }
  decode_e4m3(from + i, n - i, to + i);
}

// n <= CHUNK of NVFP4, a multiple of 64, in their order, scaled by their blocks' scales times 2^-8, as BF16: they have 6
// significant bits.
inline void nvfp4_halves(const uint8_t* p, __m128i scale, int64_t n, uint16_t* to) {
  __m256 scales[2], w[2][4];
  decode_scales(scale, scales);
  each<4>([&](auto i) INLINED {
    if (i * 64 >= n) return;
    decode_nvfp4(p + i * 32, w);
    each<2>([&](auto h) INLINED {
      // Elements 0 4 8 12, 2 6 10 14, 1 5 9 13 and 3 7 11 15 of two blocks, of which one in each half.
      __m256i quarter[4];
      UNROLL for (int j = 0; j < 4; j++) quarter[j] = (__m256i)_mm256_mul_ps(w[h][j], two_scales<i % 2, h>(scales[i / 2]));
      const __m256i even = _mm256_blend_epi16(_mm256_srli_epi32(quarter[0], 16), quarter[1], 0xaa);
      const __m256i odd = _mm256_blend_epi16(_mm256_srli_epi32(quarter[2], 16), quarter[3], 0xaa);
      const __m256i eight[2] = {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
      UNROLL for (int k = 0; k < 2; k++) {
        __m128i* block = reinterpret_cast<__m128i*>(to + i * 64 + h * 16 + k * 8);
        _mm_storeu_si128(block, _mm256_castsi256_si128(eight[k]));
        _mm_storeu_si128(block + 4, _mm256_extracti128_si256(eight[k], 1));
      }
    });
  });
}

inline void decode_nvfp4_row(const View& v, int64_t row, uint16_t* to) {
  const uint8_t *p = v.values + row * v.row_bytes, *scale = v.scale + row * v.scale_cols;
  for (int64_t k = 0; k < v.in; k += CHUNK) {
    const int64_t n = v.in - k < CHUNK ? v.in - k : CHUNK;
    const __m128i scales = chunk_scales(scale + k / 16, n);
    if (n % 64 == 0) {
      nvfp4_halves(p + k / 2, scales, n, to + k);
    } else {
      uint16_t values[CHUNK];
      nvfp4_halves(Padded(p + k / 2, n / 2).bytes, scales, CHUNK, values);
      __builtin_memcpy(to + k, values, n * 2);
    }
  }
}

// What is missing in decoded weights and in sums of their products.
inline float decoded_factor(const View& v) { return v.format == NVFP4 ? v.factor * SCALE_SHIFT : v.factor; }

}  // namespace
}  // namespace ISA
