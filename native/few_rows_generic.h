// Products of few rows for instruction sets without a way of their own: 256 inputs of four weight rows at a time are decoded
// to FP32, and all rows of activations are multiplied by them while they are near.
#pragma once
#include "decode.h"

namespace ISA {
namespace {

inline Layout dot_layout(const Weight&) { return FLOATS; }

// A chunk of one weight row with its scales; zeros behind the row's end.
inline void decode_chunk(const View& v, int64_t row, int64_t chunk, float* out) {
  const int64_t begin = chunk * CHUNK, end = begin + CHUNK < v.in ? begin + CHUNK : v.in;
  decode_values(v, row, begin, end, out);
  if (end < begin + CHUNK) __builtin_memset(out + end - begin, 0, (begin + CHUNK - end) * 4);
}

inline float decoded_factor(const View& v) { return v.factor; }

#if !defined(__AVX2__) && !defined(__aarch64__)
// One row, in lines of the first cache, by blocks of NVFP4: to the same bits, without a way through memory for what is decoded.
inline void one_row_of_nvfp4(const uint8_t* p, const uint8_t* scale, int64_t blocks, const float* x, vf (&total)[2]) {
  vf sums[2] = {total[0], total[1]};
  for (int64_t b = 0; b < blocks; b++, p += 8, x += 16) {
    const float* near = static_cast<const float*>(__builtin_assume_aligned(x, 64));
    uint64_t block;
    __builtin_memcpy(&block, p, 8);
    const vf factor = splat(E4M3_VALUES.values[scale[b]]);
    UNROLL for (int i = 0; i < 4; i++) sums[i % 2] = fma(four_values(block >> 16 * i) * factor, load(near + i * 4), sums[i % 2]);
  }
  total[0] = sums[0], total[1] = sums[1];
}
#endif

// out[r * stride + o - first], o in [first, last). A row's results do not depend on the number of rows.
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
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
      const int64_t left = v.in - c < CHUNK ? v.in - c : CHUNK, width = ceil_div(left, 2 * W) * 2 * W;
      fetch_bytes(next, O * chunk_bytes);
      next += O * chunk_bytes;
      if (v.format == NVFP4) fetch(next_scale + c / CHUNK * O * 16);
#if !defined(__AVX2__) && !defined(__aarch64__)
      if (v.format == NVFP4 && rows.count == 1) {
        const float* x = reinterpret_cast<const float*>(rows.at(0) + c / CHUNK * rows.step);
        for (int i = 0; i < count; i++)
          one_row_of_nvfp4(
              v.values + (o + i) * v.row_bytes + c / 2, v.scale + (o + i) * v.scale_cols + c / 16, left / 16, x, sums[0][i]);
        continue;
      }
#endif
      for (int i = 0; i < O; i++) decode_chunk(v, i < count ? o + i : o, c / CHUNK, decoded[i]);
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

}  // namespace
}  // namespace ISA
