// Per-head products around absorbed attention, and what goes into the latent cache.

// y[t, h, :] = sum over n of x[t, h, n] * w[h, n, :]: rows of w are added up, so that w is read as it lies.
inline void absorb(const HeadArgs& a) {
  const int threads = useful_threads(a.threads, a.heads * a.in * a.out * 2, a.tokens * a.heads * a.in * a.out);
  parallel(threads, a.heads, [&](int64_t h) {
    const uint16_t* w = a.weight + h * a.in * a.out;
    const uint16_t* x = a.x + h * a.head_stride;
    float* total = static_cast<float*>(scratch(SCRATCH_TILE, a.tokens * a.out * 4 + a.in * 8));
#if defined(__AVX512BF16__)
    if (a.out % 32 == 0 && a.in % 2 == 0) {
      const uint16_t** row = reinterpret_cast<const uint16_t**>(total + a.tokens * a.out);
      for (int64_t n = 0; n < a.in; n++) row[n] = w + n * a.out;
      int64_t t = 0;
      for (; t + 4 <= a.tokens; t += 4)
        weighted_sum_rows<4>(x + t * a.token_stride, a.token_stride, row, a.in, a.out, total + t * a.out);
      for (; t < a.tokens; t++)
        weighted_sum_rows<1>(x + t * a.token_stride, a.token_stride, row, a.in, a.out, total + t * a.out);
    } else
#endif
    {
      for (int64_t i = 0; i < a.tokens * a.out; i++) total[i] = 0;
      for (int64_t n = 0; n < a.in; n++)
        for (int64_t t = 0; t < a.tokens; t++) {
          const float value = from_bf16(x[t * a.token_stride + n]);
          float* to = total + t * a.out;
          int64_t d = 0;
          for (; d + W <= a.out; d += W) store(to + d, fma(splat(value), load_bf16(w + n * a.out + d), load(to + d)));
          for (; d < a.out; d++) to[d] += value * from_bf16(w[n * a.out + d]);
        }
    }
    for (int64_t t = 0; t < a.tokens; t++)
      round_row(total + t * a.out, a.out, a.y + (t * a.heads + h) * a.out);
  });
}

// y[t, h, o] = sum over i of x[t, h, i] * w[h, o, i]
inline void per_head(const HeadArgs& a) {
  Weight weight{};
  weight.format = PLAIN;
  weight.in = a.in;
  const int threads = useful_threads(a.threads, a.heads * a.in * a.out * 2, a.tokens * a.heads * a.in * a.out);
  const Layout layout = dot_layout(weight);
  parallel(threads, a.heads, [&](int64_t h) {
    const int64_t bytes = a.tokens * layout_bytes(layout, a.in);
    uint8_t* memory = static_cast<uint8_t*>(scratch(SCRATCH_TILE, bytes + a.tokens * a.out * 4));
    float* result = reinterpret_cast<float*>(memory + bytes);
    const Rows rows = rows_in(memory, layout, a.tokens);
    for (int64_t t = 0; t < a.tokens; t++)
      prepare_row(a.x + t * a.token_stride + h * a.head_stride, a.in, weight, layout, rows.at(t), rows.step);
    View v{};
    v.format = PLAIN;
    v.values = reinterpret_cast<const uint8_t*>(a.weight + h * a.out * a.in);
    v.row_bytes = a.in * 2;
    v.in = a.in;
    v.out = a.out;
    v.factor = 1.0f;
    dot_product(v, 0, a.out, rows, result, a.out);
    for (int64_t t = 0; t < a.tokens; t++) round_row(result + t * a.out, a.out, a.y + (t * a.heads + h) * a.out);
  });
}

// Entry t: the norm of x[t, :latent], then x[t, latent:] rotated.
inline void latent_entries(const EntryArgs& a) {
  const int64_t width = a.latent + a.rope;
  for (int64_t t = 0; t < a.tokens; t++) {
    const uint16_t* x = a.x + t * a.x_stride;
    uint16_t* y = a.y + t * width;
    norm_row(x, a.latent, a.weight, a.eps, y);
    rotate(x + a.latent, a.rope, a.cos + t * (a.rope / 2), a.sin + t * (a.rope / 2), y + a.latent);
  }
}

// cache[slots[t]] = entry t, rounded to E4M3 with saturation where the cache is FP8.
inline void store_entries(const StoreArgs& a) {
  for (int64_t t = 0; t < a.tokens; t++) {
    const uint16_t* from = a.entries + t * a.width;
    uint8_t* to = a.cache + a.slots[t] * a.width * (a.fp8 ? 1 : 2);
    if (!a.fp8) {
      __builtin_memcpy(to, from, a.width * 2);
      continue;
    }
    for (int64_t i = 0; i < a.width; i++) {
      const float value = from_bf16(from[i]), magnitude = __builtin_fabsf(value);
      to[i] = static_cast<uint8_t>(to_e4m3(magnitude > 448.0f ? 448.0f : magnitude) | (from[i] >> 8 & 0x80));
    }
  }
}

// FP32 products for the router: y = x W^T, x BF16.
inline void linear_fp32(const Fp32Args& a) {
  const int threads = useful_threads(a.threads, a.out * a.in * 4, a.rows * a.out * a.in * 2);
  const int64_t padded = ceil_div(a.in, W) * W;
  float* x = static_cast<float*>(scratch(SCRATCH_INPUT, a.rows * padded * 4));
  for (int64_t r = 0; r < a.rows; r++) {
    int64_t i = 0;
    for (; i + W <= a.in; i += W) store(x + r * padded + i, load_bf16(a.x + r * a.x_stride + i));
    for (; i < a.in; i++) x[r * padded + i] = from_bf16(a.x[r * a.x_stride + i]);
  }
  constexpr int64_t O = 4;
  parallel(threads, ceil_div(a.out, O), [&](int64_t item) {
    const int64_t count = a.out - item * O < O ? a.out - item * O : O;
    const float* w[O];
    for (int64_t o = 0; o < O; o++) w[o] = a.weight + (item * O + (o < count ? o : 0)) * a.in;
    for (int64_t r = 0; r < a.rows; r++) {
      const float* from = x + r * padded;
      vf total[O] = {};
      int64_t i = 0;
      for (; i + W <= a.in; i += W)
        for (int64_t o = 0; o < O; o++) total[o] = fma(load(w[o] + i), load(from + i), total[o]);
      for (int64_t o = 0; o < count; o++) {
        float result = sum(total[o]);
        for (int64_t j = i; j < a.in; j++) result += w[o][j] * from[j];
        a.y[r * a.out + item * O + o] = result;
      }
    }
  });
}
