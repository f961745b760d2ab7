// Products for instruction sets without BF16 or int8 dot products: a few weight rows at a time are decoded to FP32.

inline Layout layout_for(const Weight&, int64_t) { return FLOATS; }
inline Layout dot_layout(const Weight&) { return FLOATS; }

// out[r * stride + o - first] = dot of activations r with weight row o, for o in [first, last).
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  constexpr int O = 4;
  int64_t padded = ceil_div(v.in, 128) * 128;
  float* decoded = static_cast<float*>(scratch(SCRATCH_PANEL, O * padded * 4));
  for (int64_t o = first; o < last; o += O) {
    int count = last - o < O ? static_cast<int>(last - o) : O;
    for (int i = 0; i < O; i++) decode_row(v, i < count ? o + i : o, decoded + i * padded);
    for (int64_t r = 0; r < rows.count; r++) {
      vf total[O][2] = {};
      for (int64_t c = 0; c < padded; c += CHUNK) {
        const float* x = reinterpret_cast<const float*>(rows.at(r) + c / CHUNK * rows.step);
        const float* w = decoded + c;
        const int64_t width = padded - c < CHUNK ? padded - c : CHUNK;
        for (int64_t k = 0; k < width; k += 2 * W)
          for (int i = 0; i < O; i++) {
            total[i][0] = fma(load(w + i * padded + k), load(x + k), total[i][0]);
            total[i][1] = fma(load(w + i * padded + k + W), load(x + k + W), total[i][1]);
          }
      }
      for (int i = 0; i < count; i++) out[r * stride + o - first + i] = sum(total[i][0] + total[i][1]) * v.factor;
    }
  }
}
