// Decoding in registers with AVX2: weights become vectors of FP32, in the order that activations are laid out in.
//
// A BF16 is the upper half of an FP32, so a vector of BF16 becomes two of FP32: its even elements by a shift, its odd ones by
// a mask. An NVFP4 value times its block's scale has at most 8 significant bits and is a BF16, too: a table has the 16
// values' upper and lower bytes for every scale, and two look-ups of bytes give values that are scaled already.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

#define UNROLL _Pragma("GCC unroll 16")  // arrays of vectors must become registers

struct ScaledValues {
  alignas(32) uint8_t high[256][16], low[256][16];  // [E4M3 scale][E2M1 code]
};
constexpr ScaledValues scaled_values() {
  ScaledValues t{};
  for (int scale = 0; scale < 256; scale++)
    for (int code = 0; code < 16; code++) {
      const int field = scale >> 3 & 15, significand = field ? 8 + (scale & 7) : scale & 7;
      const int product = TWICE_E2M1[code & 7] * significand;  // of 2^(exponent - 11)
      int bits = 0, top = 0;
      while (product >> top > 1) top++;
      if ((scale & 127) == 127) bits = 0x7fc0;
      else if (product) bits = (127 + top + (field ? field : 1) - 11) << 7 | ((product << (7 - top)) & 127);
      bits |= ((code >> 3) ^ (scale >> 7)) << 15;
      t.high[scale][code] = static_cast<uint8_t>(bits >> 8);
      t.low[scale][code] = static_cast<uint8_t>(bits & 255);
    }
  return t;
}
alignas(64) inline constexpr ScaledValues SCALED_VALUES = scaled_values();

INLINED inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Even and odd elements of 16 BF16.
INLINED inline __m256 even_halves(__m256i x) { return (__m256)_mm256_slli_epi32(x, 16); }
INLINED inline __m256 odd_halves(__m256i x) {
  return (__m256)_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
}

// Two blocks of NVFP4, one in each half of the vector: their 8 low nibbles, then their 8 high ones. halves: their even
// elements and their odd ones, BF16.
INLINED inline void decode_blocks(__m256i codes, uint8_t first_scale, uint8_t second_scale, __m256i (&halves)[2]) {
  auto table = [&](const uint8_t (&bytes)[256][16]) INLINED {
    return _mm256_set_m128i(
        _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[second_scale])),
        _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[first_scale])));
  };
  const __m256i high = _mm256_shuffle_epi8(table(SCALED_VALUES.high), codes);
  const __m256i low = _mm256_shuffle_epi8(table(SCALED_VALUES.low), codes);
  halves[0] = _mm256_unpacklo_epi8(low, high);
  halves[1] = _mm256_unpackhi_epi8(low, high);
}

// 64 values of NVFP4: codes of blocks 0 and 2, and of 1 and 3, as decode_blocks() takes them.
INLINED inline void split_nibbles(const uint8_t* p, __m256i (&codes)[2]) {
  const __m256i packed = load_bytes(p), nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(packed, nibble), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
  codes[0] = _mm256_unpacklo_epi64(low, high);
  codes[1] = _mm256_unpackhi_epi64(low, high);
}

// 64 values of NVFP4 in QUARTERS.
INLINED inline void decode_nvfp4(const uint8_t* p, const uint8_t* scale, __m256 (&w)[2][4]) {
  __m256i codes[2];
  split_nibbles(p, codes);
  UNROLL for (int i = 0; i < 2; i++) {
    __m256i halves[2];
    decode_blocks(codes[i], scale[i], scale[i + 2], halves);
    UNROLL for (int h = 0; h < 2; h++) {
      w[i][2 * h] = even_halves(halves[h]);
      w[i][2 * h + 1] = odd_halves(halves[h]);
    }
  }
}

// 32 of E4M3 in FLOATS, times 2^-8: the bits are those of an FP16 number.
constexpr float SCALE_SHIFT = 256.0f;
INLINED inline void decode_fp8(const uint8_t* p, __m256 (&w)[4]) {
  const __m256i bytes = load_bytes(p), zero = _mm256_setzero_si256();
  const __m256i sign_and_value = _mm256_set1_epi16(static_cast<short>(0xbf80)), sign = _mm256_set1_epi16(-32768);
  UNROLL for (int h = 0; h < 2; h++) {
    const __m256i words = h ? _mm256_unpackhi_epi8(zero, bytes) : _mm256_unpacklo_epi8(zero, bytes);
    __m256i halves = _mm256_and_si256(_mm256_srai_epi16(words, 1), sign_and_value);
    halves = _mm256_or_si256(halves, _mm256_cmpeq_epi16(_mm256_or_si256(halves, sign), sign_and_value));  // NaN
    w[h] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    w[h + 2] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
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
  return weight.format == NVFP4 ? QUARTERS : weight.format == PLAIN ? PAIRS : FLOATS;
}

// Up to 64 values of NVFP4 or 32 others that end a row, padded with zeros.
struct Rest {
  alignas(32) uint8_t bytes[64] = {};
  uint8_t scale[4] = {};

  Rest(const uint8_t* p, int64_t size) { __builtin_memcpy(bytes, p, size); }
  Rest(const uint8_t* p, const uint8_t* scales, int64_t blocks) : Rest(p, blocks * 8) {
    __builtin_memcpy(scale, scales, blocks);
  }
};

// A chunk of one weight row, in the activations' layout and with its scales; zeros behind the row's end.
inline void decode_chunk(const View& v, int64_t row, int64_t chunk, float* out) {
  const uint8_t* p = v.values + row * v.row_bytes;
  const int64_t begin = chunk * CHUNK, left = v.in - begin < CHUNK ? v.in - begin : CHUNK;
  if (left < CHUNK) __builtin_memset(out, 0, CHUNK * 4);
  if (v.format == NVFP4) {
    const uint8_t* scale = v.scale + row * v.scale_cols + begin / 16;
    p += begin / 2;
    for (int64_t k = 0; k < left; k += 64) {
      __m256 w[2][4];
      if (left - k >= 64) {
        decode_nvfp4(p + k / 2, scale + k / 16, w);
      } else {
        const Rest rest(p + k / 2, scale + k / 16, (left - k) / 16);
        decode_nvfp4(rest.bytes, rest.scale, w);
      }
      UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + k + i * 8, w[i / 4][i % 4]);
    }
  } else if (v.format == PLAIN) {
    p += begin * 2;
    for (int64_t k = 0; k < left; k += 32) {
      __m256 w[4];
      if (left - k >= 32) decode_plain(p + k * 2, w);
      else decode_plain(Rest(p + k * 2, (left - k) * 2).bytes, w);
      UNROLL for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + k + i * 8, w[i]);
    }
  } else {
    p += begin;
    const int64_t width = v.scale ? v.block_cols : v.in;
    for (int64_t k = 0, stop; k < left; k = stop) {
      const int64_t block = (begin + k) / width, block_end = (block + 1) * width - begin;
      stop = block_end < left ? block_end : left;
      const __m256 scale = _mm256_set1_ps(block_scale(v, row, block) * SCALE_SHIFT);
      for (int64_t i = k; i < stop; i += 32) {
        __m256 w[4];
        if (stop - i >= 32) decode_fp8(p + i, w);
        else decode_fp8(Rest(p + i, stop - i).bytes, w);
        float values[32];
        UNROLL for (int j = 0; j < 4; j++) _mm256_storeu_ps(values + j * 8, _mm256_mul_ps(w[j], scale));
        __builtin_memcpy(out + i, values, (stop - i < 32 ? stop - i : 32) * 4);
      }
    }
  }
}

// n values of E4M3 as BF16, in their order.
inline void decode_e4m3(const uint8_t* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256 w[4];
    decode_fp8(from + i, w);
    UNROLL for (int j = 0; j < 4; j += 2) {
      const __m256 factor = _mm256_set1_ps(SCALE_SHIFT);
      const __m256i a = _mm256_srli_epi32((__m256i)_mm256_mul_ps(w[j], factor), 16);
      const __m256i b = _mm256_srli_epi32((__m256i)_mm256_mul_ps(w[j + 1], factor), 16);
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(to + i + j * 8), _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8));
    }
  }
  for (; i < n; i++) to[i] = to_bf16(from_e4m3(from[i]));
}

// A row of NVFP4 as BF16 in its order, scaled by its blocks' scales; n a multiple of 16.
inline void decode_nvfp4_row(const uint8_t* p, const uint8_t* scale, int64_t n, uint16_t* to) {
  for (int64_t k = 0; k < n; k += 64) {
    const int64_t blocks = n - k < 64 ? (n - k) / 16 : 4;
    const Rest rest(p + k / 2, scale + k / 16, blocks);
    __m256i codes[2];
    split_nibbles(rest.bytes, codes);
    alignas(32) uint16_t values[4][16];
    UNROLL for (int i = 0; i < 2; i++) {
      __m256i halves[2];
      decode_blocks(codes[i], rest.scale[i], rest.scale[i + 2], halves);
      const __m256i first = _mm256_unpacklo_epi16(halves[0], halves[1]), second = _mm256_unpackhi_epi16(halves[0], halves[1]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(values[i]), _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_store_si256(reinterpret_cast<__m256i*>(values[i + 2]), _mm256_permute2x128_si256(first, second, 0x31));
    }
    __builtin_memcpy(to + k, values, blocks * 32);
  }
}

}  // namespace
}  // namespace ISA
