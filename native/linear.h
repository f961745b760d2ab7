// y = x W^T, rounded to BF16 once.
#pragma once
#include "products.h"

namespace ISA {
namespace {

constexpr int64_t STRIDE = 64;  // outputs of a panel, and the least of a result tile's row
constexpr int64_t WIDE = 256;   // outputs of a task, where there are enough of them

// Outputs a task computes: little enough that all threads get some. Panels are always whole.
inline int64_t tile_width(int64_t outputs, bool few, int threads, int64_t widest = WIDE) {
  int64_t width = widest;
  const int64_t narrowest = few ? 8 : STRIDE;
  const int64_t enough = threads == 1 ? 1 : 4 * threads;
  while (width > narrowest && ceil_div(outputs, width) < enough) width /= 2;
  return width;
}

// Activations in one layout, in the given memory.
inline Rows prepare_rows(
    const uint16_t* x, int64_t x_stride, int64_t count, const Weight& weight, Layout layout, void* memory, int threads) {
  const Rows rows = rows_in(static_cast<uint8_t*>(memory), layout, count);
  // A task copies a block of rows and chunks that lie together on both sides: about a microsecond.
  const int64_t chunks = ceil_div(weight.in, CHUNK), tall = count < 16 ? count : 16, wide = count < 4 ? 32 : 8;
  const int64_t across = ceil_div(chunks, wide);
  parallel(threads, count ? ceil_div(count, tall) * across : 0, [&](int64_t item) {
    const int64_t r0 = item / across * tall, c0 = item % across * wide;
    for (int64_t c = c0; c < c0 + wide && c < chunks; c++)
      for (int64_t r = r0; r < r0 + tall && r < count; r++) {
        const int64_t left = weight.in - c * CHUNK;
        prepare_chunk(
            x + r * x_stride + c * CHUNK, left < CHUNK ? left : CHUNK, weight, layout, rows.at(r) + c * rows.step);
      }
  });
  return rows;
}

// out[r * stride + o - first]
inline void tile(
    const View& v, int64_t first, int64_t last, const Rows& rows, bool few, float* out, int64_t stride) {
  if (few) dot_product(v, first, last, rows, out, stride);
  else panel_product(v, first, last, rows, out, stride);
}

inline bool are_few(int64_t rows) { return rows <= FEW_ROWS; }

inline void linear(const LinearArgs& a) {
  const Weight& weight = *a.weight;
  const bool few = are_few(a.rows);
  const Layout layout = layout_for(weight, a.rows);
  void* memory = scratch(SCRATCH_INPUT, rows_bytes(layout, weight.in, a.rows));
  const int threads =
      useful_threads(a.threads, weight.out * row_bytes(weight), a.rows * weight.out * weight.in);
  const Rows rows = prepare_rows(a.x, a.x_stride, a.rows, weight, layout, memory, threads);
  int64_t begin = 0;
  for (int part = 0; part < weight.parts; part++) {
    const View v = view_of(weight, part, a.expert);
    const int64_t width = tile_width(v.out, few, threads), stride = width < STRIDE ? STRIDE : width;
    parallel(threads, ceil_div(v.out, width), [&](int64_t item) {
      float* result = static_cast<float*>(scratch(SCRATCH_TILE, rows.count * stride * 4));
      const int64_t first = item * width, last = first + width < v.out ? first + width : v.out;
      tile(v, first, last, rows, few, result, stride);
      for (int64_t r = 0; r < rows.count; r++)
        round_row(result + r * stride, last - first, a.y + r * weight.out + begin + first);
    });
    begin += v.out;
  }
}

}  // namespace
}  // namespace ISA
