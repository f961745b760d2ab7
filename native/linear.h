// y = x W^T, rounded to BF16 once.

constexpr int64_t STRIDE = 64;  // of a result tile's rows

// Outputs a task computes: at most STRIDE, and little enough that all threads get some. A panel is always whole.
inline int64_t tile_width(int64_t outputs, [[maybe_unused]] bool few, int threads) {
  int64_t width = STRIDE;
  while (few && width > 8 && ceil_div(outputs, width) < 4 * threads) width /= 2;
  return width;
}

// Activations in one layout, in the given memory.
inline Rows prepare_rows(
    const uint16_t* x, int64_t x_stride, int64_t count, const Weight& weight, Layout layout, void* memory, int threads) {
  const Rows rows = rows_in(static_cast<uint8_t*>(memory), layout, count);
  const int64_t chunks = ceil_div(weight.in, CHUNK), batch = 32;  // chunks a task: about a microsecond
  parallel(threads, ceil_div(count * chunks, batch), [&](int64_t item) {
    for (int64_t i = item * batch; i < (item + 1) * batch && i < count * chunks; i++) {
      const int64_t r = i / chunks, c = i % chunks, left = weight.in - c * CHUNK;
      prepare_chunk(
          x + r * x_stride + c * CHUNK, left < CHUNK ? left : CHUNK, weight, layout, rows.at(r) + c * rows.step);
    }
  });
  return rows;
}

// out[r * STRIDE + o - first]
inline void tile(const View& v, int64_t first, int64_t last, const Rows& rows, [[maybe_unused]] bool few, float* out) {
#if defined(__AVX512BF16__)
  if (!few) return panel_product(v, first, last, rows, out);
#endif
  dot_product(v, first, last, rows, out, STRIDE);
}

inline bool are_few([[maybe_unused]] int64_t rows) {
#if defined(__AVX512BF16__)
  return rows <= FEW_ROWS;
#else
  return true;
#endif
}

inline void linear(const LinearArgs& a) {
  const Weight& weight = *a.weight;
  const bool few = are_few(a.rows);
  const Layout layout = layout_for(weight, a.rows);
  void* memory = scratch(SCRATCH_INPUT, a.rows * layout_bytes(layout, weight.in));
  const int threads =
      useful_threads(a.threads, weight.out * row_bytes(weight), a.rows * weight.out * weight.in);
  const Rows rows = prepare_rows(a.x, a.x_stride, a.rows, weight, layout, memory, threads);
  int64_t begin = 0;
  for (int part = 0; part < weight.parts; part++) {
    const View v = view_of(weight, part, a.expert);
    const int64_t width = tile_width(v.out, few, threads);
    parallel(threads, ceil_div(v.out, width), [&](int64_t item) {
      float* result = static_cast<float*>(scratch(SCRATCH_TILE, rows.count * STRIDE * 4));
      const int64_t first = item * width, last = first + width < v.out ? first + width : v.out;
      tile(v, first, last, rows, few, result);
      for (int64_t r = 0; r < rows.count; r++)
        round_row(result + r * STRIDE, last - first, a.y + r * weight.out + begin + first);
    });
    begin += v.out;
  }
}
