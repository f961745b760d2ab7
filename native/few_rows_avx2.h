// Products of few rows with AVX2, for which memory decides.
//
// Weights become FP32 in registers as they stream by, in the order that they lie in, and meet up to four rows of
// activations, which stay in the first cache: where they would not, 8 outputs take turns at as many inputs as do. 32
// products are added up before they join a row's sum, so one vector of sums a row is enough to keep multiplying. Each
// result is computed in the same order whatever the number of rows.
#pragma once
#include "codes_avx2.h"

namespace ISA {
namespace {

constexpr int64_t GROUP = 8;     // outputs that take turns
constexpr int64_t BATCH = 16;    // rows of activations whose sums wait meanwhile
constexpr int64_t NEAR = 22528;  // bytes of activations that stay near

// Weight rows [row, stop), chunks [begin, end) of each.
struct Turn {
  int64_t row, stop, begin, end;
  Address next, next_scale;  // what to fetch meanwhile, as many bytes as are multiplied
};

// R rows of activations at a chunk.
template <int R>
struct Near {
  const uint8_t* bytes[R];
  explicit Near(const uint8_t* only) : bytes{only} {}
  Near(const Rows& rows, int64_t r, int64_t chunk) {
    UNROLL for (int i = 0; i < R; i++) bytes[i] = rows.at(r + i) + chunk * rows.step;
  }
  INLINED void advance(int64_t step) {
    UNROLL for (int i = 0; i < R; i++) bytes[i] += step;
  }
  INLINED __m256 values(int r, int64_t at) const { return _mm256_loadu_ps(reinterpret_cast<const float*>(bytes[r]) + at); }
};

// sum[r] = w times 32 activations of row r.
template <int R>
INLINED inline void products(const __m256 (&w)[4], const Near<R>& near, int64_t at, __m256 (&sum)[R]) {
  UNROLL for (int r = 0; r < R; r++) {
    sum[r] = _mm256_mul_ps(w[0], near.values(r, at));
    UNROLL for (int i = 1; i < 4; i++) sum[r] = _mm256_fmadd_ps(w[i], near.values(r, at + i * 8), sum[r]);
  }
}
template <int R>
INLINED inline void add_products(const __m256 (&w)[4], const Near<R>& near, int64_t at, __m256 (&total)[R]) {
  __m256 sum[R];
  products(w, near, at, sum);
  UNROLL for (int r = 0; r < R; r++) total[r] = _mm256_add_ps(total[r], sum[r]);
}

// 128 inputs by activations in QUARTERS. The sums of a block are scaled before they join the row's.
__attribute__((noinline)) inline __m256 one_row_of_quarters(const uint8_t* p, __m256 scales, const uint8_t* x, __m256 total) {
  const Near<1> near(x);
  each<2>([&](auto i) INLINED {
    __m256 w[2][4];
    decode_nvfp4(p + i * 32, w);
    each<2>([&](auto h) INLINED {
      __m256 sum[1];
      products(w[h], near, i * 64 + h * 32, sum);
      total = _mm256_fmadd_ps(sum[0], two_scales<i, h>(scales), total);
    });
  });
  return total;
}

// What NVFP4 is multiplied by: total[r] += a chunk, or the H-th half of it, of a weight row by the r-th chunk of x.
struct Codes {
  template <int H, int R>
  INLINED static void half(const uint8_t* p, __m256 scales, const uint8_t* const (&x)[R], __m256 (&total)[R]) {
    multiply_codes<R, H>(p, scales, x, total);
  }
  template <int R>
  INLINED static void chunk(
      const uint8_t* p, const __m256 (&scales)[2], const uint8_t* const (&x)[R], __m256 (&total)[R]) {
    each<2>([&](auto h) INLINED { half<h>(p + h * 64, scales[h], x, total); });
  }
};
struct Digits {
  template <int H, int R>
  INLINED static void half(const uint8_t* p, __m256 scales, const uint8_t* const (&x)[R], __m256 (&total)[R]) {
    const uint8_t* at[R];
    int32_t kind[R], all = -1;
    UNROLL for (int r = 0; r < R; r++) {
      at[r] = x[r] + H * HALF_BYTES;
      __builtin_memcpy(&kind[r], x[r] + DIGITS_KIND + H * 4, 4);
      all &= kind[r];
    }
    if (all) return multiply_digits(p, scales, at, total);
    for (int r = 0; r < R; r++)
      total[r] = kind[r] ? one_row_of_digits(p, scales, at[r], total[r]) : one_row_of_quarters(p, scales, at[r], total[r]);
  }
  template <int R>
  INLINED static void chunk(
      const uint8_t* p, const __m256 (&scales)[2], const uint8_t* const (&x)[R], __m256 (&total)[R]) {
    int64_t all = -1;
    UNROLL for (int r = 0; r < R; r++) {
      int64_t kinds;
      __builtin_memcpy(&kinds, x[r] + DIGITS_KIND, 8);
      all &= kinds;
    }
    each<2>([&](auto h) INLINED {
      if (__builtin_expect(all == -1, 1)) {
        const uint8_t* at[R];
        UNROLL for (int r = 0; r < R; r++) at[r] = x[r] + h * HALF_BYTES;
        multiply_digits(p + h * 64, scales[h], at, total);
      } else {
        half<h>(p + h * 64, scales[h], x, total);
      }
    });
  }
};

// Weight rows one after the other, in each of them chunks from the turn's first one on.
//
// Of NVFP4.
template <int R, class Activations>
struct Nvfp4Rows {
  static constexpr int64_t CHUNK_BYTES = CHUNK / 2;
  static constexpr bool BLOCK_SCALES = true;
  const uint8_t *p = nullptr, *scale = nullptr, *next, *next_scale;
  const int64_t row_bytes, scale_cols;

  Nvfp4Rows(const View& v, const Turn& turn)
      : next(v.values + turn.row * v.row_bytes + turn.begin * CHUNK_BYTES),
        next_scale(v.scale + turn.row * v.scale_cols + turn.begin * 16), row_bytes(v.row_bytes), scale_cols(v.scale_cols) {}

  INLINED void next_row() {
    p = next, scale = next_scale;
    next += row_bytes, next_scale += scale_cols;
  }

  INLINED void chunk(const Near<R>& near, __m256 (&total)[R]) {
    __m256 scales[2];
    decode_scales(scale, scales);
    Activations::chunk(p, scales, near.bytes, total);
    p += CHUNK_BYTES;
    scale += 16;
  }
  void rest(int64_t n, const Near<R>& near, __m256 (&total)[R]) {
    __m256 scales[2];
    decode_scales(some_scales(scale, n / 16), scales);
    each<2>([&](auto h) INLINED {
      const int64_t left = n - h * 128;
      const uint8_t* from = p + h * 64;
      if (left >= 128) Activations::template half<h>(from, scales[h], near.bytes, total);
      else if (left > 0) Activations::template half<h>(Padded(from, left / 2).bytes, scales[h], near.bytes, total);
    });
  }
};
template <int R>
using CodedRows = Nvfp4Rows<R, Codes>;
template <int R>
using ExactRows = Nvfp4Rows<R, Digits>;

template <int R>
struct PlainRows {
  static constexpr int64_t CHUNK_BYTES = CHUNK * 2;
  static constexpr bool BLOCK_SCALES = false;
  const uint8_t *p = nullptr, *next;
  const int64_t row_bytes;

  PlainRows(const View& v, const Turn& turn)
      : next(v.values + turn.row * v.row_bytes + turn.begin * CHUNK_BYTES), row_bytes(v.row_bytes) {}

  INLINED void next_row() {
    p = next;
    next += row_bytes;
  }

  INLINED static void multiply(const uint8_t* p, const Near<R>& near, int64_t at, __m256 (&total)[R]) {
    __m256 w[4];
    decode_plain(p, w);
    add_products(w, near, at, total);
  }
  INLINED void chunk(const Near<R>& near, __m256 (&total)[R]) {
    for (int i = 0; i < 8; i++) multiply(p + i * 64, near, i * 32, total);
    p += CHUNK_BYTES;
  }
  void rest(int64_t n, const Near<R>& near, __m256 (&total)[R]) {
    int64_t k = 0;
    for (; n - k >= 32; k += 32) multiply(p + k * 2, near, k, total);
    if (k < n) multiply(Padded(p + k * 2, (n - k) * 2).bytes, near, k, total);
  }
};

// total[r] += 32 of FP8 times activations.
template <bool NORMAL, int R>
INLINED inline void add_fp8(const uint8_t* p, const Near<R>& near, int64_t at, __m256 (&total)[R]) {
  __m256 w[4];
  decode_fp8<NORMAL>(p, w);
  add_products(w, near, at, total);
}
template <int R>
INLINED inline void add_any_fp8(const uint8_t* p, const Near<R>& near, int64_t at, __m256 (&total)[R]) {
  if (__builtin_expect(are_normal<32>(p), 1)) add_fp8<true>(p, near, at, total);
  else add_fp8<false>(p, near, at, total);
}

// Of FP8 with a scale for every 128 inputs, whose sums are scaled before they join the row's.
template <int R>
struct Fp8BlockRows {
  static constexpr int64_t CHUNK_BYTES = CHUNK;
  static constexpr bool BLOCK_SCALES = false;
  const uint8_t *p = nullptr, *next;
  const float *scale = nullptr, *row_scale;  // of a row's first scale block in this turn, for so many rows more:
  int64_t rows_left;
  const int64_t row_bytes, height, scale_cols;

  Fp8BlockRows(const View& v, const Turn& turn)
      : next(v.values + turn.row * v.row_bytes + turn.begin * CHUNK_BYTES),
        row_scale(reinterpret_cast<const float*>(v.scale) + turn.row / v.block_rows * v.scale_cols + turn.begin * 2),
        rows_left(v.block_rows - turn.row % v.block_rows), row_bytes(v.row_bytes), height(v.block_rows),
        scale_cols(v.scale_cols) {}

  INLINED void next_row() {
    if (rows_left-- == 0) rows_left = height - 1, row_scale += scale_cols;
    p = next, scale = row_scale;
    next += row_bytes;
  }
  INLINED static void scaled(const __m256 (&part)[R], float scale, __m256 (&total)[R]) {
    UNROLL for (int r = 0; r < R; r++) total[r] = _mm256_fmadd_ps(part[r], _mm256_set1_ps(scale), total[r]);
  }
  template <bool NORMAL>
  INLINED static void block_products(const uint8_t* p, const Near<R>& near, int64_t at, __m256 (&part)[R]) {
    __m256 w[4];
    decode_fp8<NORMAL>(p, w);
    products(w, near, at, part);
    UNROLL for (int64_t k = 32; k < 128; k += 32) add_fp8<NORMAL>(p + k, near, at + k, part);
  }
  INLINED static void block(const uint8_t* p, float scale, const Near<R>& near, int64_t at, __m256 (&total)[R]) {
    __m256 part[R];
    if (__builtin_expect(are_normal<128>(p), 1)) block_products<true>(p, near, at, part);
    else block_products<false>(p, near, at, part);
    scaled(part, scale, total);
  }
  INLINED void chunk(const Near<R>& near, __m256 (&total)[R]) {
    UNROLL for (int b = 0; b < 2; b++) block(p + b * 128, scale[b], near, b * 128, total);
    p += CHUNK, scale += 2;
  }
  INLINED void rest(int64_t n, const Near<R>& near, __m256 (&total)[R]) {
    int64_t k = 0;
    if (n >= 128) block(p, *scale++, near, 0, total), k = 128;
    if (k == n) return;
    __m256 part[R] = {};
    for (; n - k >= 32; k += 32) add_any_fp8(p + k, near, k, part);
    if (k < n) add_any_fp8(Padded(p + k, n - k).bytes, near, k, part);
    scaled(part, *scale, total);
  }
};

// Of FP8 with other scale blocks, or without scales.
template <int R>
struct Fp8Rows {
  static constexpr int64_t CHUNK_BYTES = CHUNK;
  static constexpr bool BLOCK_SCALES = false;
  const uint8_t *p = nullptr, *next;
  const float* scale = nullptr;  // of the scale block that `left` inputs are left of; null: 1
  int64_t left = 0;
  const float* row_scale = nullptr;  // of a row's first scale block in this turn, for so many rows more
  int64_t rows_left, first_left;
  const int64_t row_bytes, width, height, scale_cols;

  Fp8Rows(const View& v, const Turn& turn)
      : next(v.values + turn.row * v.row_bytes + turn.begin * CHUNK_BYTES), rows_left(v.out), first_left(v.in),
        row_bytes(v.row_bytes), width(v.scale ? v.block_cols : v.in), height(v.block_rows), scale_cols(v.scale_cols) {
    if (!v.scale) return;
    const int64_t block = turn.begin * CHUNK / width;
    row_scale = reinterpret_cast<const float*>(v.scale) + turn.row / height * scale_cols + block;
    rows_left = height - turn.row % height;
    first_left = (block + 1) * width - turn.begin * CHUNK;
  }

  INLINED void next_row() {
    if (rows_left-- == 0) rows_left = height - 1, row_scale += scale_cols;
    p = next, scale = row_scale, left = first_left;
    next += row_bytes;
  }
  INLINED void chunk(const Near<R>& near, __m256 (&total)[R]) { rest(CHUNK, near, total); }
  INLINED void rest(int64_t n, const Near<R>& near, __m256 (&total)[R]) {
    for (int64_t k = 0; k < n;) {
      const int64_t stop = left < n - k ? k + left : n;
      __m256 part[R] = {};
      left -= stop - k;
      if (k % 32 == 0)
        for (; stop - k >= 32; k += 32) add_any_fp8(p + k, near, k, part);
      while (k < stop) {
        const int64_t step = k / 32 * 32, end = step + 32 < stop ? step + 32 : stop;
        add_any_fp8(Padded(p + k, end - k, k - step).bytes, near, step, part);
        k = end;
      }
      const __m256 factor = _mm256_set1_ps(scale ? *scale : 1.0f);
      UNROLL for (int r = 0; r < R; r++) total[r] = _mm256_fmadd_ps(part[r], factor, total[r]);
      if (left == 0) left = width, scale += scale != nullptr;
    }
    p += n;
  }
};

// sums[output of the group * BATCH + r]: of what came before this turn, if it is not the first, and after it.
template <template <int> class Weights, int R>
__attribute__((noinline)) void turn_of_rows(const View& v, const Turn& turn, const Rows& rows, int64_t r, __m256* sums) {
  Address next = turn.next, next_scale = turn.next_scale;
  const int64_t whole = turn.end * CHUNK <= v.in ? turn.end : turn.end - 1;
  Weights<R> weights(v, turn);
  const Near<R> first(rows, r, turn.begin);
  for (int64_t row = turn.row; row < turn.stop; row++, sums += BATCH) {
    weights.next_row();
    Near<R> near = first;
    __m256 total[R];
    UNROLL for (int i = 0; i < R; i++) total[i] = turn.begin ? sums[i] : _mm256_setzero_ps();
    for (int64_t c = turn.begin; c < whole; c++) {
      fetch_bytes(next, Weights<R>::CHUNK_BYTES);
      next += Weights<R>::CHUNK_BYTES;
      if constexpr (Weights<R>::BLOCK_SCALES) fetch(next_scale), next_scale += 16;
      weights.chunk(near, total);
      near.advance(rows.step);
    }
    if (whole < turn.end) weights.rest(v.in - whole * CHUNK, near, total);
    UNROLL for (int i = 0; i < R; i++) sums[i] = total[i];
  }
}

// As many rows of activations at once, up to 4, as spread them evenly. Returns how many.
template <template <int> class Weights>
inline int64_t turn_of_some(const View& v, const Turn& turn, const Rows& rows, int64_t r, int64_t left, __m256* sums) {
  const int64_t count = left <= 4 ? left : left < 8 ? (left + 1) / 2 : 4;
  if (count == 4) turn_of_rows<Weights, 4>(v, turn, rows, r, sums);
  else if (count == 3) turn_of_rows<Weights, 3>(v, turn, rows, r, sums);
  else if (count == 2) turn_of_rows<Weights, 2>(v, turn, rows, r, sums);
  else turn_of_rows<Weights, 1>(v, turn, rows, r, sums);
  return count;
}

// The sums of eight vectors' lanes.
inline __m256 lane_sums(const __m256* v, int64_t stride) {
  auto four = [&](int64_t i) INLINED {
    const __m256 a = _mm256_hadd_ps(v[i * stride], v[(i + 1) * stride]);
    return _mm256_hadd_ps(a, _mm256_hadd_ps(v[(i + 2) * stride], v[(i + 3) * stride]));
  };
  const __m256 a = four(0), b = four(4);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

template <template <int> class Weights>
inline void few_rows_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  const int64_t chunks = ceil_div(v.in, CHUNK), together = rows.count < 4 ? rows.count : 4;
  const int64_t length = together ? NEAR / (together * rows.row_bytes) : chunks;
  const int64_t ahead = ceil_div(v.ahead, GROUP * v.row_bytes) * GROUP;  // weight rows
  const float factor = decoded_factor(v) * code_factor(v);
  __m256 sums[GROUP * BATCH];
  for (int64_t group = first; group < last; group += GROUP) {
    const int64_t stop = group + GROUP < last ? group + GROUP : last;
    Address next = address(v.values) + (group + ahead) * v.row_bytes;
    Address next_scale = v.format == NVFP4 ? address(v.scale) + (group + ahead) * v.scale_cols : next;
    if (next >= v.end) next += v.jump, next_scale += v.scale_jump;
    for (int64_t r0 = 0; r0 < rows.count; r0 += BATCH) {
      const int64_t count = rows.count - r0 < BATCH ? rows.count - r0 : BATCH;
      for (int64_t begin = 0; begin < chunks; begin += length) {
        const int64_t end = begin + length < chunks ? begin + length : chunks, done = begin * (stop - group);
        const Turn turn{group, stop, begin, end, next + done * Weights<1>::CHUNK_BYTES, next_scale + done * 16};
        for (int64_t r = 0; r < count;) r += turn_of_some<Weights>(v, turn, rows, r0 + r, count - r, sums + r);
      }
      for (int64_t r = 0; r < count; r++) {
        alignas(32) float results[GROUP];
        float* to = out + (r0 + r) * stride + group - first;
        const __m256 all = _mm256_mul_ps(lane_sums(sums + r, BATCH), _mm256_set1_ps(factor));
        if (stop - group == GROUP) {
          _mm256_storeu_ps(to, all);
        } else {
          _mm256_store_ps(results, all);
          __builtin_memcpy(to, results, (stop - group) * 4);
        }
      }
    }
  }
}

// out[r * stride + o - first], o in [first, last). A row's results do not depend on the number of rows.
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  if (v.activations != AS_BF16) few_rows_product<CodedRows>(v, first, last, rows, out, stride);
  else if (v.format == NVFP4) few_rows_product<ExactRows>(v, first, last, rows, out, stride);
  else if (v.format == PLAIN) few_rows_product<PlainRows>(v, first, last, rows, out, stride);
  else if (v.scale && v.block_cols == 128) few_rows_product<Fp8BlockRows>(v, first, last, rows, out, stride);
  else few_rows_product<Fp8Rows>(v, first, last, rows, out, stride);
}

}  // namespace
}  // namespace ISA
