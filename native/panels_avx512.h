// Products of many rows with AVX-512: 64 outputs' weights are decoded into a panel with outputs in lanes, which many
// rows then share.
#pragma once
#include "decode_avx512.h"

namespace ISA {
namespace {

constexpr int64_t TILE = 64;          // outputs of a panel
constexpr int64_t PANEL_DEPTH = 256;  // inputs of a panel
constexpr int64_t PANELS = 4;         // side by side, so that activations are read from far away a quarter as often
constexpr int64_t ROW_BLOCK = 192;    // rows that share a decoded panel while their sums stay in cache

// 16 x 16 dwords.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  UNROLL
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// 16 weight rows' next `bytes` <= 64 bytes, transposed: dword d of row i in lane i of r[d]. Rows past `last` repeat.
inline void gather16(const View& v, int64_t row, int64_t last, int64_t offset, int64_t bytes, __m512i* r) {
  __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
  for (int i = 0; i < 16; i++) {
    int64_t at = row + i < last ? row + i : last - 1;
    r[i] = _mm512_maskz_loadu_epi8(mask, v.values + at * v.row_bytes + offset);
  }
  transpose(r);
}

// FP32 scales of 16 rows' blocks [block, block + count): out[b * 16 + i], count <= 8, times 2^-8.
inline void gather_scales(const View& v, int64_t row, int64_t last, int64_t block, int64_t count, float* out) {
  alignas(64) uint8_t bytes[16][8] = {}, index[64];
  for (int i = 0; i < 16; i++) {
    const uint8_t* p = v.scale + (row + i < last ? row + i : last - 1) * v.scale_cols + block;
    if (count == 8) __builtin_memcpy(bytes[i], p, 8);
    else __builtin_memcpy(bytes[i], p, count);
  }
  for (int i = 0; i < 64; i++) index[i] = static_cast<uint8_t>(i % 16 * 8 + i / 16);
  const __m512i low = _mm512_load_si512(bytes[0]), high = _mm512_load_si512(bytes[8]), at = _mm512_load_si512(index);
  const __m512i four = _mm512_permutex2var_epi8(low, at, high);
  const __m512i rest = _mm512_permutex2var_epi8(low, _mm512_add_epi8(at, _mm512_set1_epi8(4)), high);
  alignas(64) uint8_t by_block[8][16];
  _mm512_store_si512(by_block[0], four);
  _mm512_store_si512(by_block[4], rest);
  for (int b = 0; b < 8; b++)
    _mm512_store_ps(out + b * 16, scales16(_mm_load_si128(reinterpret_cast<const __m128i*>(by_block[b]))));
}

// Panels of BF16 pairs: dword (pair p, output o) at panel[p * 64 + o]. Inputs past the row's end are zero.
inline void decode_nvfp4_panel(const View& v, int64_t row, int64_t last, int64_t k0, int64_t depth, uint32_t* panel) {
  const __m512i table = e2m1_halves();
  const __mmask32 upper = 0xaaaaaaaau;
  alignas(64) uint16_t index[32];  // the upper words of two vectors, interleaved
  for (int i = 0; i < 32; i++) index[i] = static_cast<uint16_t>((i | 1) + i % 2 * 32);
  const __m512i uppers = _mm512_load_si512(index);
  for (int group = 0; group < 4; group++)
    for (int64_t k = 0; k < depth; k += 128) {
      __m512i r[16];
      alignas(64) float scales[8 * 16];
      int64_t left = v.in - k0 - k, from = row + group * 16;
      gather16(v, from, last, (k0 + k) / 2, left / 2, r);
      gather_scales(v, from, last, (k0 + k) / 16, left / 16 < 8 ? left / 16 : 8, scales);
      uint32_t* to = panel + k / 2 * TILE + group * 16;
      UNROLL
      for (int d = 0; d < 16; d++) {  // 8 inputs
        const __m512 s = _mm512_mul_ps(_mm512_load_ps(scales + d / 2 * 16), _mm512_set1_ps(SCALE_SHIFT));
        // The nibble's BF16 in the upper word is its FP32 value; times the block scale it is still exact in BF16.
        auto values = [&](__m512i nibble) {
          return (__m512i)_mm512_mul_ps((__m512)_mm512_maskz_permutexvar_epi16(upper, nibble, table), s);
        };
        const __m512i w = r[d];
        const __m512i even[4] = {values(_mm512_slli_epi32(w, 16)), values(_mm512_slli_epi32(w, 8)), values(w),
                                 values(_mm512_srli_epi32(w, 8))};
        const __m512i odd[4] = {values(_mm512_slli_epi32(w, 12)), values(_mm512_slli_epi32(w, 4)),
                                values(_mm512_srli_epi32(w, 4)), values(_mm512_srli_epi32(w, 12))};
        UNROLL for (int j = 0; j < 4; j++)
          _mm512_store_si512(to + (d * 4 + j) * TILE, _mm512_permutex2var_epi16(even[j], uppers, odd[j]));
      }
    }
}

inline void decode_plain_panel(const View& v, int64_t row, int64_t last, int64_t k0, int64_t depth, uint32_t* panel) {
  for (int group = 0; group < 4; group++)
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i r[16];
      int64_t left = (v.in - k0 - k) * 2;
      gather16(v, row + group * 16, last, (k0 + k) * 2, left > 0 ? left : 0, r);
      for (int d = 0; d < 16; d++) _mm512_storeu_si512(panel + (k / 2 + d) * TILE + group * 16, r[d]);
    }
}

inline void decode_fp8_panel(const View& v, int64_t row, int64_t last, int64_t k0, int64_t depth, uint32_t* panel) {
  const E4m3Tables tables = e4m3_tables();
  alignas(64) uint8_t low_index[64], high_index[64];  // bytes l0 h0 l1 h1 of each dword; l2 h2 l3 h3
  for (int i = 0; i < 64; i++) {
    low_index[i] = static_cast<uint8_t>(i / 4 * 4 + i % 4 / 2 + (i & 1) * 64);
    high_index[i] = static_cast<uint8_t>(low_index[i] + 2);
  }
  const __m512i first = _mm512_load_si512(low_index), second = _mm512_load_si512(high_index);
  for (int group = 0; group < 4; group++)
    for (int64_t k = 0; k < depth; k += 64) {
      __m512i r[16];
      int64_t left = v.in - k0 - k;
      gather16(v, row + group * 16, last, k0 + k, left > 0 ? left : 0, r);
      for (int d = 0; d < 16; d++) {
        __m512i high = e4m3_high(tables, r[d]), low = e4m3_low(tables, r[d]);
        uint32_t* to = panel + (k / 2 + d * 2) * TILE + group * 16;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi8(low, first, high));
        _mm512_storeu_si512(to + TILE, _mm512_permutex2var_epi8(low, second, high));
      }
    }
}

// c[m * stride + o] += (scale[o] or 1) * sum of pairs.
template <int M>
inline void panel_rows(
    const uint8_t* const* x, int64_t x_step, const uint32_t* panel, int64_t pairs, const float* scale, float* c,
    int64_t stride) {
  __m512 total[M][4];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int j = 0; j < 4; j++)
      total[m][j] = scale ? _mm512_setzero_ps() : _mm512_loadu_ps(c + m * stride + j * 16);
  for (int64_t begin = 0; begin < pairs; begin += CHUNK / 2) {
    const int64_t offset = begin / (CHUNK / 2) * x_step, stop = begin + CHUNK / 2 < pairs ? begin + CHUNK / 2 : pairs;
    for (int64_t p = begin; p < stop; p++) {
      __m512i w[4];
      UNROLL for (int j = 0; j < 4; j++) w[j] = _mm512_load_si512(panel + p * TILE + j * 16);
      UNROLL for (int m = 0; m < M; m++) {
        int32_t pair;
        __builtin_memcpy(&pair, x[m] + offset + (p - begin) * 4, 4);
        __m512i a = _mm512_set1_epi32(pair);
        UNROLL for (int j = 0; j < 4; j++) total[m][j] = dot(total[m][j], w[j], a);
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int j = 0; j < 4; j++) {
      float* to = c + m * stride + j * 16;
      if (scale) total[m][j] = _mm512_fmadd_ps(total[m][j], _mm512_loadu_ps(scale + j * 16), _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, total[m][j]);
    }
}

// Panels for activations in CODES: for each block of 16 inputs four dwords an output, code values plus 12 as bytes, and FP32 block scales.
struct CodePanel {
  alignas(64) uint32_t words[PANEL_DEPTH / 16][4][TILE];
  alignas(64) float scales[PANEL_DEPTH / 16][TILE];
};

inline void decode_code_panel(const View& v, int64_t row, int64_t last, int64_t k0, int64_t depth, CodePanel& panel) {
  const __m512i table = e2m1_bytes();
  for (int group = 0; group < 4; group++)
    for (int64_t k = 0; k < depth; k += 128) {
      __m512i r[16];
      alignas(64) float scales[8 * 16];
      int64_t left = v.in - k0 - k, from = row + group * 16;
      gather16(v, from, last, (k0 + k) / 2, left / 2, r);
      gather_scales(v, from, last, (k0 + k) / 16, left / 16 < 8 ? left / 16 : 8, scales);
      for (int d = 0; d < 16; d++) {
        int64_t block = k / 16 + d / 2;
        uint32_t* to = panel.words[block][d % 2 * 2] + group * 16;
        _mm512_storeu_si512(to, _mm512_permutexvar_epi8(r[d], table));
        _mm512_storeu_si512(to + TILE, _mm512_permutexvar_epi8(_mm512_srli_epi16(r[d], 4), table));
        if (d % 2 == 0) _mm512_storeu_ps(panel.scales[block] + group * 16, _mm512_load_ps(scales + d / 2 * 16));
      }
    }
}

template <int M>
inline void code_rows(
    const uint8_t* const* x, int64_t x_step, const CodePanel& panel, int64_t blocks, float* c, int64_t stride) {
  __m512 total[M][4];
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int j = 0; j < 4; j++) total[m][j] = _mm512_loadu_ps(c + m * stride + j * 16);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t chunk = b / 16 * x_step, at = lane_of(b % 16);
    UNROLL
    for (int m = 0; m < M; m++) {
      const uint8_t* p = x[m] + chunk;
      __m512i start = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(p + CODES_SUM)[at]);
      __m512i t[4] = {start, start, start, start};
      for (int d = 0; d < 4; d++) {
        __m512i a = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(p + d * 64)[at]);
        UNROLL
        for (int j = 0; j < 4; j++) t[j] = _mm512_dpbusd_epi32(t[j], _mm512_load_si512(panel.words[b][d] + j * 16), a);
      }
      __m512 s = _mm512_set1_ps(reinterpret_cast<const float*>(p + CODES_SCALE)[at]);
      UNROLL
      for (int j = 0; j < 4; j++) {
        __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(t[j]), s);
        total[m][j] = _mm512_fmadd_ps(scaled, _mm512_load_ps(panel.scales[b] + j * 16), total[m][j]);
      }
    }
  }
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int j = 0; j < 4; j++) _mm512_storeu_ps(c + m * stride + j * 16, total[m][j]);
}

inline void scale_rows(float* out, int64_t rows, int64_t width, int64_t stride, float factor) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < width; i += 16)
      _mm512_storeu_ps(out + r * stride + i, _mm512_mul_ps(_mm512_loadu_ps(out + r * stride + i), _mm512_set1_ps(factor)));
}

// Rows in HALVES, or CODES; last - first <= PANELS * TILE. out[r * stride + o - first], of which
// whole tiles are written: stride is at least last - first, rounded up to TILE.
inline void panel_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  const int64_t tiles = ceil_div(last - first, TILE);
  for (int64_t r = 0; r < rows.count; r++) __builtin_memset(out + r * stride, 0, tiles * TILE * 4);
  constexpr int64_t HALVES_PANEL = PANEL_DEPTH / 2 * TILE;
  const bool integers = v.activations != AS_BF16;
  void* memory = scratch(SCRATCH_PANEL, PANELS * (integers ? sizeof(CodePanel) : HALVES_PANEL * 4));
  CodePanel* codes = static_cast<CodePanel*>(memory);
  uint32_t* halves = static_cast<uint32_t*>(memory);
  const bool scaled = v.format == FP8_BLOCK && v.scale;
  const int64_t depth_step = scaled && v.block_cols < PANEL_DEPTH ? v.block_cols : PANEL_DEPTH;
  for (int64_t begin = 0; begin < rows.count; begin += ROW_BLOCK) {
    const int64_t end = begin + ROW_BLOCK < rows.count ? begin + ROW_BLOCK : rows.count;
    for (int64_t k = 0; k < v.in; k += depth_step) {
      const int64_t depth = v.in - k < depth_step ? v.in - k : depth_step, pairs = (depth + 1) / 2;
      const int64_t at = k / CHUNK * rows.step + k % CHUNK * 2;
      float scales[PANELS][TILE];
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = first + t * TILE;
        if (integers) decode_code_panel(v, row, last, k, depth, codes[t]);
        else if (v.format == NVFP4) decode_nvfp4_panel(v, row, last, k, depth, halves + t * HALVES_PANEL);
        else if (v.format == PLAIN) decode_plain_panel(v, row, last, k, depth, halves + t * HALVES_PANEL);
        else decode_fp8_panel(v, row, last, k, depth, halves + t * HALVES_PANEL);
        if (scaled)
          for (int64_t o = 0; o < TILE; o++)
            scales[t][o] = block_scale(v, row + o < last ? row + o : last - 1, k / v.block_cols);
      }
      for (int64_t r = begin; r < end;) {
        const uint8_t* x[6];
        const int64_t left = end - r, most = integers ? 4 : 6;
        const int64_t count = left >= most ? most : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int64_t i = 0; i < count; i++) x[i] = rows.at(r + i) + at;
        // The next rows are far away, and broadcasts of single pairs do not make the processor fetch them in time.
        for (int64_t i = 0; i < most && r + count + i < end; i++)
          for (int64_t c = 0; c < depth; c += CHUNK)
            for (int64_t line = 0; line < rows.row_bytes; line += 64)
              _mm_prefetch(
                  reinterpret_cast<const char*>(rows.at(r + count + i) + at + c / CHUNK * rows.step + line), _MM_HINT_T0);
        for (int64_t t = 0; t < tiles; t++) {
          float* to = out + r * stride + t * TILE;
          const uint32_t* panel = halves + t * HALVES_PANEL;
          const float* s = scaled ? scales[t] : nullptr;
          if (integers) {
            if (count == 4) code_rows<4>(x, rows.step, codes[t], depth / 16, to, stride);
            else if (count == 2) code_rows<2>(x, rows.step, codes[t], depth / 16, to, stride);
            else code_rows<1>(x, rows.step, codes[t], depth / 16, to, stride);
          } else if (count == 6) panel_rows<6>(x, rows.step, panel, pairs, s, to, stride);
          else if (count == 4) panel_rows<4>(x, rows.step, panel, pairs, s, to, stride);
          else if (count == 2) panel_rows<2>(x, rows.step, panel, pairs, s, to, stride);
          else panel_rows<1>(x, rows.step, panel, pairs, s, to, stride);
        }
        r += count;
      }
    }
  }
  const float factor = v.factor * (integers ? SCALE_SHIFT * code_factor(v) : 1.0f);
  if (factor != 1.0f) scale_rows(out, rows.count, tiles * TILE, stride, factor);
}

}  // namespace
}  // namespace ISA
