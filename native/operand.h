// Weights as a dot product sees them, and activations in the order that its decoder yields weights in.
#pragma once
#include "rounding.h"
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "digits_avx2.h"
#endif

namespace ISA {
namespace {

constexpr int64_t FEW_ROWS = 32;  // up to so many, a row's results do not depend on the others

// One projection of one expert.
struct View {
  Format format;
  const uint8_t* values;
  const uint8_t* scale;  // null: 1
  int64_t row_bytes;
  int64_t in, out;
  int64_t block_rows, block_cols, scale_cols;
  float factor;  // on every result
  Activations activations;  // BF16 but for NVFP4
  int64_t ahead;  // least bytes from a weight to those to fetch from memory with it
  Address end;                       // of the tile; what would be fetched beyond lies
  Address jump = 0, scale_jump = 0;  // so many bytes further on, modulo 2^64
};

// After output `last` of v comes output `first` of `next`.
inline void set_next(View& v, int64_t last, const View& next, int64_t first) {
  v.end = address(v.values) + last * v.row_bytes;
  v.jump = address(next.values) + first * next.row_bytes - v.end;
  if (v.format == NVFP4)
    v.scale_jump = address(next.scale) + first * next.scale_cols - (address(v.scale) + last * v.scale_cols);
}

// What to fetch with a weight's byte at p, in the tile that set_next() ends.
INLINED inline Address ahead_of(const View& v, const uint8_t* p) {
  const Address next = address(p) + v.ahead;
  return next < v.end ? next : next + v.jump;
}

constexpr int64_t FETCH_AHEAD = 16384;  // about a microsecond of one core's reading

inline int64_t row_bytes(const Weight& weight) {
  return weight.format == PLAIN ? weight.in * 2 : weight.format == NVFP4 ? weight.in / 2 : weight.in;
}

inline View view_of(const Weight& weight, int part_index, int64_t expert) {
  const Part& part = weight.part[part_index];
  View v{};
  v.format = weight.format;
  v.in = weight.in;
  v.out = part.out;
  v.factor = 1.0f;
  v.row_bytes = row_bytes(weight);
  v.ahead = FETCH_AHEAD;
  v.values = part.values + expert * part.out * v.row_bytes;
  v.end = address(v.values) + part.out * v.row_bytes;
  if (weight.format == NVFP4) {
    v.scale_cols = weight.in / 16;
    v.scale = part.scale + expert * part.out * v.scale_cols;
    v.factor = part.scale_2[expert];
    v.activations = weight.activations;
    if (v.activations == AS_FP4) v.factor *= weight.input_scale;
  } else if (weight.format == FP8_BLOCK) {
    v.block_rows = weight.block_rows;
    v.block_cols = weight.block_cols;
    v.scale_cols = ceil_div(weight.in, v.block_cols);
    v.scale = part.scale + expert * ceil_div(part.out, v.block_rows) * v.scale_cols * 4;
  }
  return v;
}

inline float block_scale(const View& v, int64_t row, int64_t column_block) {
  return v.scale ? reinterpret_cast<const float*>(v.scale)[row / v.block_rows * v.scale_cols + column_block] : 1.0f;
}

// What sums of products in CODES are to be multiplied by: weights are taken twice, values of FP4 too.
inline float code_factor(const View& v) {
  return v.activations == AS_FP4 ? 0.25f : v.activations == AS_INT8 ? 0.5f : 1.0f;
}

// How prepared activations are laid out. Rows are padded with zeros to a multiple of 256 elements.
//   FLOATS   FP32, natural order (activations that are rounded to integers: times their scale)
//   PAIRS    (AVX2) FLOATS, of each 16 elements the even ones, then the odd ones
//   QUARTERS (AVX2) FLOATS, of each 64 elements the blocks of 16 0 and 2 together, then 1 and 3: elements 0 4 8 12 of both,
//            then 2 6 10 14, then 1 5 9 13, then 3 7 11 15
//   HALVES   BF16, natural order
//   QUADS    (AVX-512) BF16; of each 256 elements, for i = 0 .. 3: elements i and i + 4 of every block of 16, then for
//            i = 8 .. 11 the same
//   UNPACKED BF16; of each 64 elements: the low, then the high 8 of each 16
//   CODES    (AVX-512, AVX2) integers, see rounding.h
//   DIGITS   (AVX2) integers of 24 bits, halves of chunks that these do not hold in QUARTERS, see digits_avx2.h
//   In QUADS block b of a chunk is lane lane_of(b), where two shuffles of a weight's 128 bytes put it.
enum Layout { FLOATS, PAIRS, QUARTERS, HALVES, QUADS, UNPACKED, CODES, DIGITS };

inline bool is_fp32(Layout layout) { return layout == FLOATS || layout == PAIRS || layout == QUARTERS; }
inline int64_t chunk_bytes(Layout layout) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (layout == DIGITS) return DIGITS_BYTES;
#endif
  return layout == CODES ? CODES_BYTES : is_fp32(layout) ? 1024 : 512;
}

// Prepared activations, chunk after chunk of 256 elements, in each chunk row after row: a product reads them in this
// order. Row r's part of chunk c at at(r) + c * step.
struct Rows {
  uint8_t* base;
  int64_t row_bytes, step;
  const int32_t* index;  // which prepared row is row r; null: the r-th
  int64_t count;
  uint8_t* at(int64_t r) const { return base + (index ? index[r] : r) * row_bytes; }
};

#if defined(__AVX512VNNI__)
inline void split_quads(const uint16_t* x, uint16_t* out) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; i++) index[i] = static_cast<uint16_t>(i / 2 % 4 * 16 + i % 2 * 4);  // of four blocks
  const __m512i start = _mm512_load_si512(index);
  for (int i = 0; i < 8; i++) {
    const __m512i at = _mm512_add_epi16(start, _mm512_set1_epi16(static_cast<short>(i / 4 * 8 + i % 4)));
    for (int four = 0; four < 4; four++) {
      const uint16_t* from = x + four * 64;
      const __m512i pairs = _mm512_permutex2var_epi16(_mm512_loadu_si512(from), at, _mm512_loadu_si512(from + 32));
      const __m128i dwords = _mm512_castsi512_si128(pairs);
      uint16_t* to = out + i * 32 + lane_of(four * 4) * 2;  // the first two blocks' lanes; the others' are four further
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), dwords);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 8), _mm_unpackhi_epi64(dwords, dwords));
    }
  }
}
#endif

#if defined(__AVX2__)
// FP32 from its natural order.
inline void split_pairs(const float* x, float* out) {
  for (int64_t i = 0; i < CHUNK; i += 16) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
    const __m256d even = (__m256d)_mm256_shuffle_ps(a, b, 0x88), odd = (__m256d)_mm256_shuffle_ps(a, b, 0xdd);
    _mm256_storeu_ps(out + i, (__m256)_mm256_permute4x64_pd(even, 0xd8));
    _mm256_storeu_ps(out + i + 8, (__m256)_mm256_permute4x64_pd(odd, 0xd8));
  }
}

inline void split_quarters(const float* x, int64_t n, float* out) {
  for (int64_t block = 0; block < n / 16; block++) {
    __m128 r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(x + block * 16 + i * 4);
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    float* to = out + block / 4 * 64 + block % 2 * 32 + block % 4 / 2 * 4;
    for (int i = 0; i < 4; i++) _mm_storeu_ps(to + (i % 2 * 2 + i / 2) * 8, r[i]);
  }
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
inline void prepare_digits(const float* x, uint8_t* out) {
  for (int64_t h = 0; h < 2; h++) {
    const int32_t held = half_digits(x + h * 128, out + h * HALF_BYTES) ? -1 : 0;
    if (!held) split_quarters(x + h * 128, 128, reinterpret_cast<float*>(out + h * HALF_BYTES));
    __builtin_memcpy(out + DIGITS_KIND + h * 4, &held, 4);
  }
}
#endif

// n <= CHUNK BF16 activations into one chunk of a layout.
inline void prepare_chunk(const uint16_t* x, int64_t n, const Weight& weight, Layout layout, uint8_t* out) {
  uint16_t padded[CHUNK];
  if (n < CHUNK) {
    __builtin_memset(padded, 0, sizeof(padded));
    __builtin_memcpy(padded, x, n * 2);
    x = padded;
  }
  uint16_t* o = reinterpret_cast<uint16_t*>(out);
  if (is_fp32(layout) || layout == CODES || layout == DIGITS) {
    float values[CHUNK];
    for (int64_t i = 0; i < CHUNK; i += W) store(values + i, load_bf16(x + i));
    if (layout == FLOATS) __builtin_memcpy(out, values, sizeof(values));
    if (layout == FLOATS && weight.activations != AS_BF16) round_values(values, n, weight, reinterpret_cast<float*>(out));
#if defined(__AVX2__)
    if (layout == CODES && n < CHUNK) __builtin_memset(out, 0, CODES_BYTES);
    if (layout == CODES) prepare_codes(values, n, weight, out);
    if (layout == PAIRS) split_pairs(values, reinterpret_cast<float*>(out));
    if (layout == QUARTERS) split_quarters(values, CHUNK, reinterpret_cast<float*>(out));
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (layout == DIGITS) prepare_digits(values, out);
#endif
  } else if (layout == QUADS) {
#if defined(__AVX512VNNI__)
    split_quads(x, o);
#endif
  } else if (layout == UNPACKED) {
    for (int piece = 0; piece < 32; piece++)  // of 8 elements
      __builtin_memcpy(o + piece / 8 * 64 + piece % 2 * 32 + piece % 8 / 2 * 8, x + piece * 8, 16);
  } else {
    __builtin_memcpy(o, x, CHUNK * 2);
  }
}

inline void prepare_row(const uint16_t* x, int64_t n, const Weight& weight, Layout layout, uint8_t* out, int64_t step) {
  for (int64_t c = 0; c * CHUNK < n; c++)
    prepare_chunk(x + c * CHUNK, n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK, weight, layout, out + c * step);
}

// From a chunk of `count` rows to the next: a line more than they take, or one row's chunks could lie in a few of the
// first cache's sets, at distances of a power of two.
inline int64_t chunk_step(Layout layout, int64_t count) { return count * chunk_bytes(layout) + 64; }

// Memory for `count` rows of n elements, and rows laid out in it.
inline int64_t rows_bytes(Layout layout, int64_t n, int64_t count) {
  return ceil_div(n, CHUNK) * chunk_step(layout, count);
}
inline Rows rows_in(uint8_t* memory, Layout layout, int64_t count) {
  return {memory, chunk_bytes(layout), chunk_step(layout, count), nullptr, count};
}

}  // namespace
}  // namespace ISA
