// Source weights (FP8 in blocks, or BF16) to NVFP4 with largest-magnitude scales, operation by operation as
// numerics/fp8_block.py and numerics/nvfp4.py do: through BF16, bit for bit. Two passes: the largest magnitude of each
// row, from which the caller makes the tensor's scale, and the rounding with its error.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

// The largest |value| of a row after rounding to BF16; NaN where the row holds NaN or infinity. Rounding keeps order, so
// that of FP8 a block's largest code is enough.
inline float row_amax(const SourceWeight& w, int64_t row) {
  float largest = 0;
  bool finite = true;
  if (!w.scale_inv) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(w.values) + row * w.n;
    uint16_t most = 0;
    for (int64_t i = 0; i < w.n; i++) {
      const uint16_t magnitude = x[i] & 0x7fff;
      most = magnitude > most ? magnitude : most;
    }
    largest = from_bf16(most);
    finite = most < 0x7f80;
  } else {
    const float* scales = w.scale_inv + row / w.block_rows * ceil_div(w.n, w.block_cols);
    for (int64_t start = 0; start < w.n; start += w.block_cols) {
      const int64_t stop = start + w.block_cols < w.n ? start + w.block_cols : w.n;
      const uint8_t* x = w.values + row * w.n;
      uint8_t most = 0;
      for (int64_t i = start; i < stop; i++) {
        const uint8_t magnitude = x[i] & 0x7f;
        most = magnitude > most ? magnitude : most;
      }
      const float value = from_bf16(to_bf16(from_e4m3(most) * scales[start / w.block_cols]));
      finite &= value - value == 0.0f;
      largest = value > largest ? value : largest;
    }
  }
  return finite ? largest : __builtin_nanf("");
}

inline void weight_amax(const WeightAmaxArgs& a) {
  const SourceWeight& w = a.weight;
  constexpr int64_t ROWS = 16;
  parallel(useful_threads(a.threads, w.rows * w.n, 0), ceil_div(w.rows, ROWS), [&](int64_t item) {
    for (int64_t r = item * ROWS; r < (item + 1) * ROWS && r < w.rows; r++) a.amax[r] = row_amax(w, r);
  });
}

// Sixteen weights of a row from column i on, as BF16 holds them.
inline void load_block(const SourceWeight& w, int64_t row, int64_t i, float scale, vf (&x)[16 / W]) {
  for (int j = 0; j < 16 / W; j++) {
    const int64_t at = row * w.n + i + j * W;
    x[j] = w.scale_inv ? round_bf16(from_e4m3(w.values + at) * scale)
                       : load_bf16(reinterpret_cast<const uint16_t*>(w.values) + at);
  }
}

// The values of codes 0 .. 15.
inline vf e2m1_values(vi code) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return (vf)_mm512_permutexvar_ps((__m512i)code, table);
#else
  const vi magnitude = code & 7, small = magnitude < 2;
  const vi bits = (((magnitude >> 1) + 126) << 23) | ((magnitude & 1) << 22), half = (magnitude & 1) * 0x3f000000;
  return (vf)((bits & ~small) | (half & small) | ((code & 8) << 28));
#endif
}

inline void pack_codes(const vi (&codes)[16 / W], uint8_t* out) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)codes[0]);
  const __m128i pairs = _mm_or_si128(bytes, _mm_srli_epi16(bytes, 4));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_cvtepi16_epi8(pairs));
#else
  int32_t c[16];
  __builtin_memcpy(c, codes, sizeof(c));
  for (int i = 0; i < 8; i++) out[i] = static_cast<uint8_t>(c[2 * i] | c[2 * i + 1] << 4);
#endif
}

// One block under the tensor's scale: its codes, its scale's byte; adds to the lanes' energies.
inline void convert_block(const vf (&x)[16 / W], float scale_2, uint8_t* packed, uint8_t* byte, vf& signal, vf& noise) {
  vf largest{};
  for (const vf& part : x) largest = maximum(largest, (vf)((vi)part & 0x7fffffff));
  const float amax = maximum_lane(largest);
  float scale = amax / (6.0f * scale_2);
  scale = amax == 0 || scale == 0 ? 1.0f : scale;
  scale = scale < 0.001953125f ? 0.001953125f : scale > 448.0f ? 448.0f : scale;
  *byte = to_e4m3(scale);
  const float step = from_e4m3(*byte) * scale_2, divisor = step == 0 ? __builtin_inff() : step;
  vi codes[16 / W];
  for (int j = 0; j < 16 / W; j++) {
    codes[j] = e2m1_codes(x[j] / divisor);
    const vf error = e2m1_values(codes[j]) * step - x[j];
    signal += x[j] * x[j];
    noise += error * error;
  }
  pack_codes(codes, packed);
}

inline double wide_sum(vf x) {
  double total = 0;
  for (int i = 0; i < W; i++) total += static_cast<double>(x[i]);
  return total;
}

// energies: of up to 256 weights in FP32 lanes, then in FP64.
inline void convert_row(const ConvertArgs& a, int64_t r) {
  const SourceWeight& w = a.weight;
  const float* scales = w.scale_inv ? w.scale_inv + r / w.block_rows * ceil_div(w.n, w.block_cols) : nullptr;
  double signal = 0, noise = 0;
  for (int64_t start = 0; start < w.n; start += 256) {
    vf lanes[2] = {};
    for (int64_t i = start; i < start + 256 && i < w.n; i += 16) {
      vf x[16 / W];
      load_block(w, r, i, scales ? scales[i / w.block_cols] : 1.0f, x);
      convert_block(x, a.scale_2, a.packed + (r * w.n + i) / 2, a.scale + (r * w.n + i) / 16, lanes[0], lanes[1]);
    }
    signal += wide_sum(lanes[0]);
    noise += wide_sum(lanes[1]);
  }
  a.energies[2 * r] = signal;
  a.energies[2 * r + 1] = noise;
}

inline void convert(const ConvertArgs& a) {
  constexpr int64_t ROWS = 4;
  parallel(useful_threads(a.threads, a.weight.rows * a.weight.n * 16, 0), ceil_div(a.weight.rows, ROWS), [&](int64_t item) {
    for (int64_t r = item * ROWS; r < (item + 1) * ROWS && r < a.weight.rows; r++) convert_row(a, r);
  });
}

}  // namespace
}  // namespace ISA
