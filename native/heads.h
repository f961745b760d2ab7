// Per-head products around absorbed attention, and what goes into the latent cache.
#pragma once
#include "attention.h"
#include "decode.h"
#include "small.h"

namespace ISA {
namespace {

#if defined(__AVX512BF16__)
// total[m * v.in + d] = sum over n of x[m * x_stride + n] * weight[row + n][d], d in [chunk * 256, + 256), M rows of x.
// A block of 16 a lane, as in nvfp4_avx512.h; E of its elements at a time, for whose sums there are registers.
template <int M>
inline void absorb_nvfp4_chunk(
    const View& v, int64_t row, int64_t rows, const uint16_t* x, int64_t x_stride, int64_t chunk, float* total) {
  constexpr int E = M == 1 ? 16 : M == 2 ? 8 : 4;
  const __m512 table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  const int64_t left = v.in - chunk * CHUNK, bytes = left / 2;
  const __mmask64 low = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
  const __mmask64 high = bytes >= 128 ? ~0ull : bytes <= 64 ? 0 : (1ull << (bytes - 64)) - 1;
  const int blocks = left >= CHUNK ? 16 : static_cast<int>(left / 16);
  const __mmask16 present = static_cast<__mmask16>((1u << blocks) - 1);
  __m512i sums[M][16];
  for (int first = 0; first < 16; first += E) {
    __m512 t[M][E] = {};
    for (int64_t n = 0; n < rows; n++) {
      const uint8_t* p = v.values + (row + n) * v.row_bytes + chunk * 128;
      const uint8_t* s = v.scale + (row + n) * v.scale_cols + chunk * 16;
      if (first == 0) {
        fetch_bytes(ahead_of(v, p), CHUNK / 2);
        if (n % 2 == 0) fetch(address(s) + v.ahead / 8);
      }
      const __m512i packed[2] = {_mm512_maskz_loadu_epi8(low, p), _mm512_maskz_loadu_epi8(high, p + 64)};
      const __m512i halves[2] = {block_halves<0>(packed[0], packed[1]), block_halves<1>(packed[0], packed[1])};
      const __m512 scale = lane_scales(_mm_maskz_loadu_epi8(present, s));
      __m512 scaled[M];  // exact: 8 and 4 significant bits
      UNROLL for (int m = 0; m < M; m++)
        scaled[m] = _mm512_mul_ps(scale, _mm512_set1_ps(from_bf16(x[m * x_stride + n])));
      UNROLL for (int e = 0; e < E; e++) {
        // The index's upper bits do not matter.
        const __m512i codes = _mm512_srli_epi32(halves[(first + e) / 8], (first + e) % 8 * 4);
        const __m512 value = _mm512_permutexvar_ps(codes, table);
        UNROLL for (int m = 0; m < M; m++) t[m][e] = _mm512_fmadd_ps(value, scaled[m], t[m][e]);
      }
    }
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int e = 0; e < E; e++) sums[m][first + e] = (__m512i)t[m][e];
  }
  for (int m = 0; m < M; m++) {
    transpose(sums[m]);
    for (int b = 0; b < blocks; b++) _mm512_storeu_si512(total + m * v.in + chunk * CHUNK + b * 16, sums[m][lane_of(b)]);
  }
}

template <int M>
inline void absorb_nvfp4(const View& v, int64_t row, int64_t rows, const uint16_t* x, int64_t x_stride, float* total) {
  for (int64_t chunk = 0; chunk * CHUNK < v.in; chunk++)
    absorb_nvfp4_chunk<M>(v, row, rows, x, x_stride, chunk, total);
}

template <bool FAR>
inline void weighted_sums(
    const uint16_t* x, int64_t x_stride, const uint16_t* const* entry, int64_t keys, int64_t rows, int64_t n, float* total) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    weighted_sum_rows<4, FAR>(x + r * x_stride, x_stride, entry, keys, n, total + r * n);
  for (; r < rows; r++) weighted_sum_rows<1, FAR>(x + r * x_stride, x_stride, entry, keys, n, total + r * n);
}

// Rows of an FP8 weight that share scales, decoded to BF16; their sums are scaled.
inline void absorb_fp8(
    const View& v, int64_t row, int64_t rows, const uint16_t* x, int64_t x_stride, int64_t tokens, float* total) {
  const int64_t height = v.scale ? v.block_rows : rows, width = v.scale ? v.block_cols : v.in;
  uint8_t* memory = static_cast<uint8_t*>(scratch(SCRATCH_PANEL, rows * (v.in * 2 + 8) + tokens * v.in * 4));
  const uint16_t** entry = reinterpret_cast<const uint16_t**>(memory);
  float* part = reinterpret_cast<float*>(entry + rows);
  uint16_t* decoded = reinterpret_cast<uint16_t*>(part + tokens * v.in);
  __builtin_memset(total, 0, tokens * v.in * 4);
  for (int64_t n = 0; n < rows;) {
    const int64_t block = (row + n) / height * height + height - row, stop = v.scale && block < rows ? block : rows;
    for (int64_t i = n; i < stop; i++) {
      uint16_t* to = decoded + i * v.in;
      decode_e4m3(v.values + (row + i) * v.row_bytes, v.in, to);
      fetch_bytes(ahead_of(v, v.values + (row + i) * v.row_bytes), v.row_bytes);
      entry[i - n] = to;
    }
    weighted_sums<false>(x + n, x_stride, entry, stop - n, tokens, v.in, part);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t d = 0; d < v.in; d++) total[t * v.in + d] += part[t * v.in + d] * block_scale(v, row + n, d / width);
    n = stop;
  }
}

// Whether every run of rows with one scale has a length that weighted_sum_block takes.
inline bool absorbs_fp8(const View& v, const HeadArgs& a) {
  const bool even = a.rows % 2 == 0 && (!v.scale || (v.block_rows % 2 == 0 && a.first % 2 == 0 && v.out / a.heads % 2 == 0));
  return v.format == FP8_BLOCK && v.in % 32 == 0 && even;
}
#elif defined(__AVX2__)
// total[t * v.in + d] = sum over n of x[t * rows + n] * weight[row + n][d]: rows of the weight are BF16, or become it.
// Those of an FP8 weight that share scales are summed up together, and their sums scaled.
inline void absorb_halves(const View& v, int64_t row, int64_t rows, const float* x, int64_t tokens, float* total) {
  const int64_t height = v.format == FP8_BLOCK && v.scale ? v.block_rows : rows;
  uint8_t* memory = static_cast<uint8_t*>(scratch(SCRATCH_PANEL, rows * (v.in * 2 + 8) + tokens * v.in * 4));
  const uint16_t** entry = reinterpret_cast<const uint16_t**>(memory);
  float* part = reinterpret_cast<float*>(entry + rows);
  uint16_t* decoded = reinterpret_cast<uint16_t*>(part + tokens * v.in);
  const bool scaled = v.format == FP8_BLOCK && v.scale;
  if (scaled) __builtin_memset(total, 0, tokens * v.in * 4);
  for (int64_t n = 0; n < rows;) {
    const int64_t block = scaled ? ((row + n) / height + 1) * height - row : rows, stop = block < rows ? block : rows;
    for (int64_t i = n; i < stop; i++) {
      const uint8_t* from = v.values + (row + i) * v.row_bytes;
      uint16_t* to = decoded + i * v.in;
      fetch_bytes(ahead_of(v, from), v.row_bytes);
      if (v.format == NVFP4) decode_nvfp4_row(v, row + i, to);
      else if (v.format == FP8_BLOCK) decode_fp8_row(from, v.in, to);
      entry[i - n] = v.format == PLAIN ? reinterpret_cast<const uint16_t*>(from) : to;
    }
    weighted_sums(x + n, rows, entry, stop - n, tokens, v.in, scaled ? part : total);
    for (int64_t t = 0; t < tokens && scaled; t++)
      for (int64_t d = 0; d < v.in;) {
        const int64_t end = (d / v.block_cols + 1) * v.block_cols, last = end < v.in ? end : v.in;
        const float scale = block_scale(v, row + n, d / v.block_cols);
        for (; d < last; d++) total[t * v.in + d] += part[t * v.in + d] * scale;
      }
    n = stop;
  }
}

// Of NVFP4, v.in % 64 == 0, for one token: 64 columns at a time, whose sums stay in registers while the rows pass by.
// Meanwhile the next chunk is fetched, a quarter of it in each turn. Bits are those of absorb_halves(): x times a block's
// scale is exact in FP32, as the weight times it is.
inline void absorb_nvfp4(const View& v, int64_t row, int64_t rows, const float* x, float* total) {
  typedef __m256 Scales[2];
  Scales* factors = static_cast<Scales*>(scratch(SCRATCH_PANEL, rows * sizeof(Scales)));
  const Address next_scale = address(v.scale) + (row + rows) * v.scale_cols + v.scale_jump;  // the next head's
  for (int64_t chunk = 0; chunk * CHUNK < v.in; chunk++) {
    const uint8_t* p = v.values + row * v.row_bytes + chunk * (CHUNK / 2);
    const int64_t left = v.in - chunk * CHUNK < CHUNK ? v.in - chunk * CHUNK : CHUNK;
    const Address next = (chunk + 1) * CHUNK < v.in ? address(p) + CHUNK / 2 : v.end + v.jump;
    for (int64_t n = 0; n < rows; n++) {
      fetch(next_scale + n * v.scale_cols + chunk * 16);
      decode_scales(chunk_scales(v.scale + (row + n) * v.scale_cols + chunk * 16, left), factors[n]);
      UNROLL for (int i = 0; i < 2; i++) factors[n][i] = _mm256_mul_ps(factors[n][i], _mm256_set1_ps(x[n]));
    }
    each<4>([&](auto i) INLINED {
      if (i * 64 >= left) return;
      __m256 sum[2][4] = {};
      for (int64_t n = 0; n < rows; n++) {
        if (n % 2 == i % 2) fetch(next + n * v.row_bytes + i / 2 * 64);
        const __m256 factor = factors[n][i / 2];
        each_nvfp4(p + n * v.row_bytes + i * 32, [&](auto h, auto j, __m256 w) INLINED {
          sum[h][j] = _mm256_fmadd_ps(w, two_scales<i % 2, h>(factor), sum[h][j]);
          asm volatile("" : "+x"(sum[h][j]));  // GCC would decode all of them first, and keep a sum in memory
        });
      }
      UNROLL for (int h = 0; h < 2; h++) {  // elements 0 4 8 12, 2 6 10 14, 1 5 9 13, 3 7 11 15 of a block in each half
        const __m256* s = sum[h];
        const __m256 low[2] = {_mm256_unpacklo_ps(s[0], s[2]), _mm256_unpacklo_ps(s[1], s[3])};
        const __m256 high[2] = {_mm256_unpackhi_ps(s[0], s[2]), _mm256_unpackhi_ps(s[1], s[3])};
        const __m256 fours[4] = {_mm256_shuffle_ps(low[0], low[1], 0x44), _mm256_shuffle_ps(low[0], low[1], 0xee),
                                 _mm256_shuffle_ps(high[0], high[1], 0x44), _mm256_shuffle_ps(high[0], high[1], 0xee)};
        float* to = total + chunk * CHUNK + i * 64 + h * 16;
        UNROLL for (int k = 0; k < 4; k++) {
          _mm_storeu_ps(to + k * 4, _mm256_castps256_ps128(fours[k]));
          _mm_storeu_ps(to + 32 + k * 4, _mm256_extractf128_ps(fours[k], 1));
        }
      }
    });
  }
}
#endif

// The rows that head h takes of a weight, after which the next head's are fetched.
inline View head_view(const HeadArgs& a, int64_t h) {
  View v = view_of(*a.weight, 0, 0);
  const int64_t each = v.out / a.heads, row = h * each + a.first;
  set_next(v, row + a.rows, v, h + 1 < a.heads ? row + each : row + a.rows);
  return v;
}

// Rows are added up, so that the weight is read as it lies.
inline void absorb(const HeadArgs& a) {
  const View whole = view_of(*a.weight, 0, 0);
  const int64_t each = whole.out / a.heads, multiplied = a.heads * a.rows * whole.in;
  const int threads = useful_threads(a.threads, a.heads * a.rows * whole.row_bytes, a.tokens * multiplied);
  parallel(threads, a.heads, [&](int64_t h) {
    const View v = head_view(a, h);
    const uint16_t* x = a.x + h * a.head_stride;
    const int64_t row = h * each + a.first;
    float* total = static_cast<float*>(scratch(SCRATCH_TILE, a.tokens * v.in * 4 + (a.rows + v.in + 128) * 8));
#if defined(__AVX512BF16__)
    if (v.format == NVFP4) {
      int64_t t = 0;
      for (; t + 4 <= a.tokens; t += 4)
        absorb_nvfp4<4>(v, row, a.rows, x + t * a.token_stride, a.token_stride, total + t * v.in);
      for (; t + 2 <= a.tokens; t += 2)
        absorb_nvfp4<2>(v, row, a.rows, x + t * a.token_stride, a.token_stride, total + t * v.in);
      for (; t < a.tokens; t++)
        absorb_nvfp4<1>(v, row, a.rows, x + t * a.token_stride, a.token_stride, total + t * v.in);
    } else if (absorbs_fp8(v, a)) {
      absorb_fp8(v, row, a.rows, x, a.token_stride, a.tokens, total);
    } else if (v.format == PLAIN && v.in % 32 == 0 && a.rows % 2 == 0) {
      const uint16_t** entry = reinterpret_cast<const uint16_t**>(total + a.tokens * v.in);
      for (int64_t n = 0; n < a.rows; n++) entry[n] = reinterpret_cast<const uint16_t*>(v.values) + (row + n) * v.in;
      weighted_sums<true>(x, a.token_stride, entry, a.rows, a.tokens, v.in, total);
    } else
#elif defined(__AVX2__)
    if (v.in % SUMMED == 0) {
      float* values = static_cast<float*>(scratch(SCRATCH_INPUT, a.tokens * a.rows * 4));
      for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t n = 0; n < a.rows; n++) values[t * a.rows + n] = from_bf16(x[t * a.token_stride + n]);
      // Decoding again for another token is cheaper than keeping what is decoded.
      if (v.format == NVFP4 && v.in % 64 == 0 && a.tokens < 4)
        for (int64_t t = 0; t < a.tokens; t++) absorb_nvfp4(v, row, a.rows, values + t * a.rows, total + t * v.in);
      else absorb_halves(v, row, a.rows, values, a.tokens, total);
    } else
#endif
    {
      float* w = total + a.tokens * v.in;
      for (int64_t i = 0; i < a.tokens * v.in; i++) total[i] = 0;
      for (int64_t n = 0; n < a.rows; n++) {
        decode_row(v, row + n, w);
        for (int64_t t = 0; t < a.tokens; t++) {
          const float value = from_bf16(x[t * a.token_stride + n]);
          float* to = total + t * v.in;
          int64_t d = 0;
          for (; d + W <= v.in; d += W) store(to + d, fma(splat(value), load(w + d), load(to + d)));
          for (; d < v.in; d++) to[d] += value * w[d];
        }
      }
    }
    float factor = v.factor;
#if defined(__AVX512BF16__)
    if (v.format == NVFP4) factor *= SCALE_SHIFT;
#elif defined(__AVX2__)
    if (v.in % SUMMED == 0) factor = decoded_factor(v);
#endif
    if (factor != 1.0f)
      for (int64_t i = 0; i < a.tokens * v.in; i++) total[i] *= factor;
    for (int64_t t = 0; t < a.tokens; t++) round_row(total + t * v.in, v.in, a.y + (t * a.heads + h) * v.in);
  });
}

inline void per_head(const HeadArgs& a) {
  const Weight& weight = *a.weight;
  const View v = view_of(weight, 0, 0);
  const int64_t each = v.out / a.heads;
  const int threads =
      useful_threads(a.threads, a.heads * a.rows * v.row_bytes, a.tokens * a.heads * a.rows * v.in);
  const Layout layout = dot_layout(weight);
  parallel(threads, a.heads, [&](int64_t h) {
    const int64_t bytes = rows_bytes(layout, v.in, a.tokens), row = h * each + a.first;
    uint8_t* memory = static_cast<uint8_t*>(scratch(SCRATCH_TILE, bytes + a.tokens * a.rows * 4));
    float* result = reinterpret_cast<float*>(memory + bytes);
    Rows rows = rows_in(memory, layout, a.tokens);
    for (int64_t t = 0; t < a.tokens; t++)
      prepare_row(a.x + t * a.token_stride + h * a.head_stride, v.in, weight, layout, rows.at(t), rows.step);
    dot_product(head_view(a, h), row, row + a.rows, rows, result, a.rows);
    for (int64_t t = 0; t < a.tokens; t++) round_row(result + t * a.rows, a.rows, a.y + (t * a.heads + h) * a.rows);
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
  for (int64_t t = 0; t < a.tokens; t++) check_range("a cache slot", a.slots[t], 0, a.slot_count - 1);
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

}  // namespace
}  // namespace ISA
