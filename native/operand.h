// Weights as a dot product sees them, and activations in the order that its decoder yields weights in.
#pragma once
#include "simd.h"

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
  bool fp4;      // activations are FP4
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
    v.fp4 = weight.input_scale > 0;
    if (v.fp4) v.factor *= weight.input_scale;
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

// How prepared activations are laid out. Rows are padded with zeros to a multiple of 256 elements.
//   FLOATS   FP32, natural order (FP4 activations: code value times block scale)
//   PAIRS    (AVX2) FLOATS, of each 16 elements the even ones, then the odd ones
//   QUARTERS (AVX2) FLOATS, of each 64 elements the blocks of 16 0 and 2 together, then 1 and 3: elements 0 4 8 12 of both,
//            then 2 6 10 14, then 1 5 9 13, then 3 7 11 15
//   HALVES   BF16, natural order
//   QUADS    (AVX-512) BF16; of each 256 elements, for i = 0 .. 3: elements i and i + 4 of every block of 16, then for
//            i = 8 .. 11 the same
//   UNPACKED BF16; of each 64 elements: the low, then the high 8 of each 16
//   CODES    (AVX-512) of each 256 elements twice the FP4 value, int8: of every block of 16 elements 0 2 4 6, then
//            1 3 5 7, then 8 10 12 14, then 9 11 13 15; FP32 block scales; int32 -12 times the sum of a block's codes
//   In QUADS and CODES block b of a chunk is lane lane_of(b), where two shuffles of a weight's 128 bytes put it.
constexpr int64_t lane_of(int64_t block) { return (block & 1) | (block & 8) >> 2 | (block & 6) << 1; }
enum Layout { FLOATS, PAIRS, QUARTERS, HALVES, QUADS, UNPACKED, CODES };
constexpr int64_t CODES_BYTES = 384, CODES_SCALE = 256, CODES_SUM = 320;

constexpr int64_t CHUNK = 256;  // elements
inline bool is_fp32(Layout layout) { return layout == FLOATS || layout == PAIRS || layout == QUARTERS; }
inline int64_t chunk_bytes(Layout layout) { return layout == CODES ? CODES_BYTES : is_fp32(layout) ? 1024 : 512; }

// Prepared activations, chunk after chunk of 256 elements, in each chunk row after row: a product reads them in this
// order. Row r's part of chunk c at at(r) + c * step.
struct Rows {
  uint8_t* base;
  int64_t row_bytes, step;
  const int32_t* index;  // which prepared row is row r; null: the r-th
  int64_t count;
  uint8_t* at(int64_t r) const { return base + (index ? index[r] : r) * row_bytes; }
};

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

inline constexpr int8_t TWICE_E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

#if defined(__AVX512VNNI__)
// One chunk of FP4 activations in CODES: n <= CHUNK values, into zeroed memory.
inline void prepare_code_vectors(const float* x, int64_t n, float input_scale, uint8_t* out) {
  const __m512i table = _mm512_setr_epi32(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  for (int b = 0; b * 16 < n; b++) {
    int32_t codes[16];
    reinterpret_cast<float*>(out + CODES_SCALE)[lane_of(b)] = from_e4m3(quantize_block(x + b * 16, input_scale, codes));
    const __m512i values = _mm512_permutexvar_epi32(_mm512_loadu_si512(codes), table);
    alignas(16) uint8_t quarters[4][4];
    _mm_store_si128(
        reinterpret_cast<__m128i*>(quarters), _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(order, values)));
    for (int i = 0; i < 4; i++) __builtin_memcpy(out + i * 64 + lane_of(b) * 4, quarters[i], 4);
  }
  __m512i sums = _mm512_setzero_si512();
  for (int i = 0; i < 4; i++) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(12), _mm512_loadu_si512(out + i * 64));
  _mm512_storeu_si512(out + CODES_SUM, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
}

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

// One chunk of FP4 activations: n <= CHUNK values, into zeroed memory.
inline void prepare_codes(const float* x, int64_t n, float input_scale, [[maybe_unused]] Layout layout, uint8_t* out) {
#if defined(__AVX512VNNI__)
  if (layout == CODES) return prepare_code_vectors(x, n, input_scale, out);
#endif
  for (int b = 0; b * 16 < n; b++) {
    int32_t codes[16];
    const float scale = from_e4m3(quantize_block(x + b * 16, input_scale, codes));
    float* values = reinterpret_cast<float*>(out) + b * 16;
    for (int i = 0; i < 16; i++) values[i] = TWICE_E2M1[codes[i]] * 0.5f * scale;
  }
}

#if defined(__AVX2__)
// A chunk of FP32 from its natural order.
inline void split_pairs(const float* x, float* out) {
  for (int64_t i = 0; i < CHUNK; i += 16) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
    const __m256d even = (__m256d)_mm256_shuffle_ps(a, b, 0x88), odd = (__m256d)_mm256_shuffle_ps(a, b, 0xdd);
    _mm256_storeu_ps(out + i, (__m256)_mm256_permute4x64_pd(even, 0xd8));
    _mm256_storeu_ps(out + i + 8, (__m256)_mm256_permute4x64_pd(odd, 0xd8));
  }
}

inline void split_quarters(const float* x, float* out) {
  for (int64_t block = 0; block < CHUNK / 16; block++) {
    __m128 r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(x + block * 16 + i * 4);
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    float* to = out + block / 4 * 64 + block % 2 * 32 + block % 4 / 2 * 4;
    for (int i = 0; i < 4; i++) _mm_storeu_ps(to + (i % 2 * 2 + i / 2) * 8, r[i]);
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
  if (is_fp32(layout) || layout == CODES) {
    const bool codes = weight.format == NVFP4 && weight.input_scale > 0;
    float values[CHUNK];
    for (int64_t i = 0; i < CHUNK; i += W) store(values + i, load_bf16(x + i));
    if (codes && n < CHUNK) __builtin_memset(out, 0, chunk_bytes(layout));
    if (codes) prepare_codes(values, n, weight.input_scale, layout, out);
    else if (layout == FLOATS) __builtin_memcpy(out, values, sizeof(values));
#if defined(__AVX2__)
    if (codes && layout != CODES) __builtin_memcpy(values, out, sizeof(values));
    if (layout == PAIRS) split_pairs(values, reinterpret_cast<float*>(out));
    if (layout == QUARTERS) split_quarters(values, reinterpret_cast<float*>(out));
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
