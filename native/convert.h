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

// Sixteen finite weights of a row from column i on, as BF16 holds them; returns the largest magnitude.
inline float load_block(const SourceWeight& w, int64_t row, int64_t i, float scale, float* x) {
  vf largest{};
  for (int j = 0; j < 16; j += W) {
    const int64_t at = row * w.n + i + j;
    vf value;
    if (w.scale_inv) {
      const vu bits = (vu)(from_e4m3(w.values + at) * scale);
      value = (vf)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
    } else {
      value = load_bf16(reinterpret_cast<const uint16_t*>(w.values) + at);
    }
    store(x + j, value);
    largest = maximum(largest, (vf)((vi)value & 0x7fffffff));
  }
  return maximum_lane(largest);
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

// Of CHUNK_BLOCKS blocks at once, so that none waits for another's: their scales' bytes, and what a unit is worth.
constexpr int CHUNK_BLOCKS = 16;

inline void block_scales(const float* amax, float scale_2, uint8_t* bytes, float* step) {
  typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
  for (int i = 0; i < CHUNK_BLOCKS; i += W) {
    const vf largest = load(amax + i);
    vf scale = largest / (6.0f * scale_2);
    const vi one = (largest == 0) | (scale == 0);
    scale = (vf)(((vi)scale & ~one) | ((vi)splat(1.0f) & one));
    scale = maximum(scale, splat(0.001953125f));
    scale = -maximum(-scale, splat(-448.0f));
    const vi bits = (vi)scale, small = scale < 0.015625f;  // E4M3's subnormals: integers times 2^-9
    const vi integer = (vi)(scale * 512.0f + 12582912.0f) - 0x4B400000;
    const vi normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    *reinterpret_cast<vb*>(bytes + i) = __builtin_convertvector((integer & small) | (normal & ~small), vb);
    store(step + i, from_e4m3(bytes + i) * scale_2);
  }
}

// One block rounded: its codes; adds to the lanes' energies. A magnitude's nearest E2M1 value comes of adding a number that
// leaves no bits below its step (see numerics/e2m1.py, round_to_values); the sum's last bits count the steps.
inline void round_weights(const float* x, float step, uint8_t* packed, vf& signal, vf& noise) {
  const float divisor = step == 0 ? __builtin_inff() : step;
  vi codes[16 / W];
  for (int j = 0; j < 16 / W; j++) {
    const vf value = load(x + j * W), q = value / divisor;
    const vf magnitude = -maximum(-(vf)((vi)q & 0x7fffffff), splat(-6.0f));
    const vi one = (vi)splat(1.0f), power = (vi)magnitude & 0x7f800000, large = power > one;
    const vi exponent = (power & large) | (one & ~large);
    const vf big = (vf)(exponent + (0x4AC00000 - 0x3f800000));  // 1.5 * 2^22 times the power of two
    const vf sum = magnitude + big;
    codes[j] = ((vi)sum - (vi)big + ((exponent - one) >> 22)) | ((q < 0.0f) & 8);
    const vf rounded = (vf)((vi)(sum - big) | ((vi)q & static_cast<int32_t>(0x80000000)));
    const vf error = rounded * step - value;
    signal += value * value;
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
    alignas(64) float values[16 * CHUNK_BLOCKS], amax[CHUNK_BLOCKS] = {}, step[CHUNK_BLOCKS];
    uint8_t bytes[CHUNK_BLOCKS];
    const int64_t blocks = (w.n - start < 256 ? w.n - start : 256) / 16;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t i = start + 16 * b;
      amax[b] = load_block(w, r, i, scales ? scales[i / w.block_cols] : 1.0f, values + 16 * b);
    }
    block_scales(amax, a.scale_2, bytes, step);
    uint8_t* packed = a.packed + (r * w.n + start) / 2;
    for (int64_t b = 0; b < blocks; b++) round_weights(values + 16 * b, step[b], packed + 8 * b, lanes[0], lanes[1]);
    __builtin_memcpy(a.scale + (r * w.n + start) / 16, bytes, static_cast<size_t>(blocks));
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
