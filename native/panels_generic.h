// Products of many rows in FP32: a chunk of inputs of some outputs' weights is decoded once, transposed so that outputs lie
// in lanes, and all rows are multiplied by it while it is in the first cache.
#pragma once
#if defined(__AVX2__)
#include "few_rows_avx2.h"
#else
#include "few_rows_generic.h"
#endif

namespace ISA {
namespace {

constexpr int64_t TALL = 6;          // rows at a time
constexpr int64_t BROAD = 2 * W;     // outputs at a time
constexpr int64_t ROW_BLOCK = 252;   // rows that are taken through all inputs together: a chunk of them stays in cache

inline void transpose(vf (&r)[W]) {
#if defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
#elif defined(__SSE__)
  _MM_TRANSPOSE4_PS(*(__m128*)&r[0], *(__m128*)&r[1], *(__m128*)&r[2], *(__m128*)&r[3]);
#else
  for (int i = 0; i < W; i++)
    for (int j = 0; j < i; j++) {
      const float kept = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = kept;
    }
#endif
}

// panel[k * BROAD + o]: input k, in the activations' order, of weight row first + o; zeros behind the last.
inline void decode_panel(const View& v, int64_t first, int64_t last, int64_t chunk, int64_t depth, float* panel) {
  alignas(64) float rows[W][CHUNK];
  for (int64_t o = 0; o < BROAD; o += W) {
    for (int64_t i = 0; i < W; i++) {
      if (first + o + i < last) decode_chunk(v, first + o + i, chunk, rows[i]);
      else __builtin_memset(rows[i], 0, sizeof(rows[i]));
    }
    for (int64_t k = 0; k < depth; k += W) {
      vf square[W];
      for (int i = 0; i < W; i++) square[i] = load(rows[i] + k);
      transpose(square);
      for (int i = 0; i < W; i++) store(panel + (k + i) * BROAD + o, square[i]);
    }
  }
}

// c[m * stride ..] += M rows of x times a panel.
template <int M>
inline void panel_rows(const float* const* x, const float* panel, int64_t depth, float* c, int64_t stride) {
  vf total[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) total[m][0] = load(c + m * stride), total[m][1] = load(c + m * stride + W);
  for (int64_t k = 0; k < depth; k++) {
    const vf a = load(panel + k * BROAD), b = load(panel + k * BROAD + W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const vf value = splat(x[m][k]);
      total[m][0] = fma(value, a, total[m][0]);
      total[m][1] = fma(value, b, total[m][1]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) store(c + m * stride, total[m][0]), store(c + m * stride + W, total[m][1]);
}

// out[r * stride + o - first], of which whole panels are written: stride is at least last - first, rounded up to BROAD.
inline void panel_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
#if defined(__AVX2__)
  if (v.activations != AS_BF16) return dot_product(v, first, last, rows, out, stride);
#endif
  const int64_t width = ceil_div(last - first, BROAD) * BROAD;
  float* panel = static_cast<float*>(scratch(SCRATCH_PANEL, CHUNK * BROAD * 4));
  for (int64_t r = 0; r < rows.count; r++) __builtin_memset(out + r * stride, 0, width * 4);
  for (int64_t begin = 0; begin < rows.count; begin += ROW_BLOCK) {
    const int64_t end = begin + ROW_BLOCK < rows.count ? begin + ROW_BLOCK : rows.count;
    for (int64_t chunk = 0; chunk * CHUNK < v.in; chunk++) {
      const int64_t left = v.in - chunk * CHUNK, depth = left < CHUNK ? ceil_div(left, 64) * 64 : CHUNK;
      for (int64_t o = first; o < last; o += BROAD) {
        decode_panel(v, o, last, chunk, depth, panel);
        for (int64_t r = begin; r < end;) {
          const int64_t count = end - r >= TALL ? TALL : end - r >= 4 ? 4 : end - r >= 2 ? 2 : 1;
          const float* x[TALL];
          for (int64_t i = 0; i < count; i++) x[i] = reinterpret_cast<const float*>(rows.at(r + i) + chunk * rows.step);
          float* c = out + r * stride + o - first;
          if (count == TALL) panel_rows<TALL>(x, panel, depth, c, stride);
          else if (count == 4) panel_rows<4>(x, panel, depth, c, stride);
          else if (count == 2) panel_rows<2>(x, panel, depth, c, stride);
          else panel_rows<1>(x, panel, depth, c, stride);
          r += count;
        }
      }
    }
  }
  const float factor = decoded_factor(v);
  if (factor != 1.0f)
    for (int64_t r = 0; r < rows.count; r++)
      for (int64_t o = 0; o < width; o += W) store(out + r * stride + o, load(out + r * stride + o) * factor);
}

inline Layout layout_for(const Weight& weight, int64_t rows) {
  const Layout layout = dot_layout(weight);
  return rows > FEW_ROWS && layout == DIGITS ? QUARTERS : layout;
}

}  // namespace
}  // namespace ISA
