// Products for instruction sets without BF16 or int8 dot products: 256 inputs of a few weight rows at a time are decoded to
// FP32, and all rows of activations are multiplied by them while they are near.
#pragma once
#include "decode.h"
#if defined(__AVX2__)
#include "nvfp4_avx2.h"
#endif

namespace ISA {
namespace {

inline Layout dot_layout([[maybe_unused]] const Weight& weight) {
#if defined(__AVX2__)
  if (weight.format == NVFP4) return NIBBLES;
#endif
  return FLOATS;
}
inline Layout layout_for(const Weight& weight, int64_t) { return dot_layout(weight); }

// In the order of the activations' layout.
inline void decode_for_product(const View& v, int64_t row, int64_t begin, int64_t end, float* out) {
#if defined(__AVX2__)
  if (v.format == NVFP4) return decode_nibbles(v, row, begin, end, out);
#endif
  decode_values(v, row, begin, end, out);
}

template <bool MANY>
inline void generic_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  constexpr int O = 4;
  typedef vf Sums[O][2];
  Sums* const sums = static_cast<Sums*>(scratch(SCRATCH_PANEL, rows.count * sizeof(Sums)));
  alignas(64) float decoded[O][CHUNK];
  const int64_t chunk_bytes = v.format == NVFP4 ? CHUNK / 2 : v.format == FP8_BLOCK ? CHUNK : CHUNK * 2;
  const int64_t ahead = ceil_div(v.ahead, O * v.row_bytes) * O;  // weight rows
  for (int64_t o = first; o < last; o += O) {
    Address next = address(v.values) + (o + ahead) * v.row_bytes;  // to be fetched meanwhile, in the order that it lies in
    Address next_scale = v.format == NVFP4 ? address(v.scale) + (o + ahead) * v.scale_cols : next;
    if (next >= v.end) next += v.jump, next_scale += v.scale_jump;
    const int count = last - o < O ? static_cast<int>(last - o) : O;
    __builtin_memset(sums, 0, rows.count * sizeof(Sums));
    for (int64_t c = 0; c < v.in; c += CHUNK) {
      const int64_t end = c + CHUNK < v.in ? c + CHUNK : v.in, width = ceil_div(end - c, 2 * W) * 2 * W;
      fetch_bytes(next, O * chunk_bytes);
      next += O * chunk_bytes;
      if (v.format == NVFP4) fetch(next_scale + c / CHUNK * O * 16);
#if defined(__AVX2__)
      if (v.format == NVFP4 && !MANY) {
        for (int i = 0; i < count; i++) nvfp4_blocks_by_rows(v, o + i, c, end, rows, sums[0][i], O * 2);
        continue;
      }
#endif
      for (int i = 0; i < O; i++) {
        decode_for_product(v, i < count ? o + i : o, c, end, decoded[i]);
        for (int64_t k = end - c; k < width; k++) decoded[i][k] = 0;
      }
      for (int64_t r = 0; r < rows.count; r++) {
        const float* x = reinterpret_cast<const float*>(rows.at(r) + c / CHUNK * rows.step);
        vf total[O][2];
        __builtin_memcpy(total, sums[r], sizeof(Sums));
        for (int64_t k = 0; k < width; k += 2 * W)
          for (int i = 0; i < O; i++) {
            total[i][0] = fma(load(decoded[i] + k), load(x + k), total[i][0]);
            total[i][1] = fma(load(decoded[i] + k + W), load(x + k + W), total[i][1]);
          }
        __builtin_memcpy(sums[r], total, sizeof(Sums));
      }
    }
    for (int64_t r = 0; r < rows.count; r++)
      for (int i = 0; i < count; i++) out[r * stride + o - first + i] = sum(sums[r][i][0] + sums[r][i][1]) * v.factor;
  }
}

// out[r * stride + o - first], o in [first, last). A row's results do not depend on the number of rows.
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  generic_product<false>(v, first, last, rows, out, stride);
}

// The same for many rows, for which weights are decoded once.
inline void panel_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  generic_product<true>(v, first, last, rows, out, stride);
}

}  // namespace
}  // namespace ISA
