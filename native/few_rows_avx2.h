// Products of few rows with AVX2, for which memory decides.
//
// Weights become FP32 in registers as they stream by, in the order that they lie in, and meet up to four rows of
// activations, which stay in the first cache: where they would not, 8 outputs take turns at as many inputs as do. 32
// products are added up before they join a row's sum, so one vector of sums a row is enough to keep multiplying. Each
// result is computed in the same order whatever the number of rows.
#pragma once
#include "decode_avx2.h"

namespace ISA {
namespace {

constexpr int64_t GROUP = 8;     // outputs that take turns
constexpr int64_t BATCH = 16;    // rows of activations whose sums wait meanwhile
constexpr int64_t NEAR = 16384;  // bytes of activations that stay near

// Weight rows [row, stop), chunks [begin, end) of each.
struct Turn {
  int64_t row, stop, begin, end;
  Address next, next_scale;  // what to fetch meanwhile, as many bytes as are multiplied
};

// R rows of activations at a chunk.
template <int R>
struct Near {
  const float* x[R];
  Near(const Rows& rows, int64_t r, int64_t chunk) {
    UNROLL for (int i = 0; i < R; i++) x[i] = reinterpret_cast<const float*>(rows.at(r + i) + chunk * rows.step);
  }
  INLINED void advance(int64_t step) {
    UNROLL for (int i = 0; i < R; i++) x[i] += step / 4;
  }
};

// total[r] += w times 32 activations of row r.
template <int R>
INLINED inline void add_products(const __m256 (&w)[4], const Near<R>& near, int64_t at, __m256 (&total)[R]) {
  UNROLL for (int r = 0; r < R; r++) {
    __m256 sum = _mm256_mul_ps(w[0], _mm256_loadu_ps(near.x[r] + at));
    UNROLL for (int i = 1; i < 4; i++) sum = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(near.x[r] + at + i * 8), sum);
    total[r] = _mm256_add_ps(total[r], sum);
  }
}

template <int R>
struct Nvfp4Row {
  static constexpr int64_t CHUNK_BYTES = CHUNK / 2;
  static constexpr bool BLOCK_SCALES = true;
  const uint8_t *p, *scale;

  Nvfp4Row(const View& v, int64_t row, int64_t chunk)
      : p(v.values + row * v.row_bytes + chunk * CHUNK_BYTES), scale(v.scale + row * v.scale_cols + chunk * 16) {}

  INLINED static void multiply(const uint8_t* p, const uint8_t* scale, const Near<R>& near, int64_t at, __m256 (&total)[R]) {
    __m256 w[2][4];
    decode_nvfp4(p, scale, w);
    add_products(w[0], near, at, total);
    add_products(w[1], near, at + 32, total);
  }
  INLINED void chunk(const Near<R>& near, __m256 (&total)[R]) {
    for (int i = 0; i < 4; i++) multiply(p + i * 32, scale + i * 4, near, i * 64, total);
    p += CHUNK_BYTES;
    scale += 16;
  }
  void rest(int64_t n, const Near<R>& near, __m256 (&total)[R]) {
    for (int64_t k = 0; k < n; k += 64) {
      const Rest padded(p + k / 2, scale + k / 16, n - k < 64 ? (n - k) / 16 : 4);
      multiply(padded.bytes, padded.scale, near, k, total);
    }
  }
};

template <int R>
struct PlainRow {
  static constexpr int64_t CHUNK_BYTES = CHUNK * 2;
  static constexpr bool BLOCK_SCALES = false;
  const uint8_t* p;

  PlainRow(const View& v, int64_t row, int64_t chunk) : p(v.values + row * v.row_bytes + chunk * CHUNK_BYTES) {}

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
    if (k < n) multiply(Rest(p + k * 2, (n - k) * 2).bytes, near, k, total);
  }
};

// Sums of a scale block, at most a chunk, are scaled before they join the row's.
template <int R>
struct Fp8Row {
  static constexpr int64_t CHUNK_BYTES = CHUNK;
  static constexpr bool BLOCK_SCALES = false;
  const uint8_t* p;
  const float* scale;  // of the scale block that `left` inputs are left of; null: 1
  int64_t width, left;

  Fp8Row(const View& v, int64_t row, int64_t chunk)
      : p(v.values + row * v.row_bytes + chunk * CHUNK_BYTES), scale(nullptr), width(v.in), left(v.in) {
    if (!v.scale) return;
    const int64_t block = chunk * CHUNK / v.block_cols;
    scale = reinterpret_cast<const float*>(v.scale) + row / v.block_rows * v.scale_cols + block;
    width = v.block_cols;
    left = (block + 1) * width - chunk * CHUNK;
  }

  INLINED static void multiply(const uint8_t* p, const Near<R>& near, int64_t at, __m256 (&total)[R]) {
    __m256 w[4];
    decode_fp8(p, w);
    add_products(w, near, at, total);
  }
  INLINED void chunk(const Near<R>& near, __m256 (&total)[R]) { rest(CHUNK, near, total); }
  INLINED void rest(int64_t n, const Near<R>& near, __m256 (&total)[R]) {
    for (int64_t k = 0; k < n;) {
      const int64_t stop = left < n - k ? k + left : n;
      __m256 part[R] = {};
      left -= stop - k;
      for (; stop - k >= 32; k += 32) multiply(p + k, near, k, part);
      if (k < stop) multiply(Rest(p + k, stop - k).bytes, near, k, part);
      k = stop;
      const __m256 factor = _mm256_set1_ps(scale ? *scale : 1.0f);
      UNROLL for (int r = 0; r < R; r++) total[r] = _mm256_fmadd_ps(part[r], factor, total[r]);
      if (left == 0) left = width, scale += scale != nullptr;
    }
    p += n;
  }
};

// sums[output of the group * BATCH + r]: of what came before this turn, and after it.
template <template <int> class Row, int R>
__attribute__((noinline)) void turn_of_rows(const View& v, const Turn& turn, const Rows& rows, int64_t r, __m256* sums) {
  Address next = turn.next, next_scale = turn.next_scale;
  const int64_t whole = turn.end * CHUNK <= v.in ? turn.end : turn.end - 1;
  for (int64_t row = turn.row; row < turn.stop; row++, sums += BATCH) {
    Row<R> weights(v, row, turn.begin);
    Near<R> near(rows, r, turn.begin);
    __m256 total[R];
    UNROLL for (int i = 0; i < R; i++) total[i] = sums[i];
    for (int64_t c = turn.begin; c < whole; c++) {
      fetch_bytes(next, Row<R>::CHUNK_BYTES);
      next += Row<R>::CHUNK_BYTES;
      if constexpr (Row<R>::BLOCK_SCALES) fetch(next_scale), next_scale += 16;
      weights.chunk(near, total);
      near.advance(rows.step);
    }
    if (whole < turn.end) weights.rest(v.in - whole * CHUNK, near, total);
    UNROLL for (int i = 0; i < R; i++) sums[i] = total[i];
  }
}

// As many rows of activations at once, up to 4, as spread them evenly. Returns how many.
template <template <int> class Row>
inline int64_t turn_of_some(const View& v, const Turn& turn, const Rows& rows, int64_t r, int64_t left, __m256* sums) {
  const int64_t count = left <= 4 ? left : left < 8 ? (left + 1) / 2 : 4;
  if (count == 4) turn_of_rows<Row, 4>(v, turn, rows, r, sums);
  else if (count == 3) turn_of_rows<Row, 3>(v, turn, rows, r, sums);
  else if (count == 2) turn_of_rows<Row, 2>(v, turn, rows, r, sums);
  else turn_of_rows<Row, 1>(v, turn, rows, r, sums);
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

template <template <int> class Row>
inline void few_rows_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  const int64_t chunks = ceil_div(v.in, CHUNK), together = rows.count < 4 ? rows.count : 4;
  const int64_t length = together ? NEAR / (together * rows.row_bytes) : chunks;
  const int64_t ahead = ceil_div(v.ahead, GROUP * v.row_bytes) * GROUP;  // weight rows
  const float factor = v.factor * (v.format == FP8_BLOCK ? SCALE_SHIFT : 1.0f);
  __m256 sums[GROUP * BATCH];
  for (int64_t group = first; group < last; group += GROUP) {
    const int64_t stop = group + GROUP < last ? group + GROUP : last;
    Address next = address(v.values) + (group + ahead) * v.row_bytes;
    Address next_scale = v.format == NVFP4 ? address(v.scale) + (group + ahead) * v.scale_cols : next;
    if (next >= v.end) next += v.jump, next_scale += v.scale_jump;
    for (int64_t r0 = 0; r0 < rows.count; r0 += BATCH) {
      const int64_t count = rows.count - r0 < BATCH ? rows.count - r0 : BATCH;
      for (int64_t i = 0; i < GROUP; i++) __builtin_memset(sums + i * BATCH, 0, count * sizeof(__m256));
      for (int64_t begin = 0; begin < chunks; begin += length) {
        const int64_t end = begin + length < chunks ? begin + length : chunks, done = begin * (stop - group);
        const Turn turn{group, stop, begin, end, next + done * Row<1>::CHUNK_BYTES, next_scale + done * 16};
        for (int64_t r = 0; r < count;) r += turn_of_some<Row>(v, turn, rows, r0 + r, count - r, sums + r);
      }
      for (int64_t r = 0; r < count; r++) {
        alignas(32) float results[GROUP];
        _mm256_store_ps(results, _mm256_mul_ps(lane_sums(sums + r, BATCH), _mm256_set1_ps(factor)));
        __builtin_memcpy(out + (r0 + r) * stride + group - first, results, (stop - group) * 4);
      }
    }
  }
}

// out[r * stride + o - first], o in [first, last). A row's results do not depend on the number of rows.
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  if (v.format == NVFP4) few_rows_product<Nvfp4Row>(v, first, last, rows, out, stride);
  else if (v.format == PLAIN) few_rows_product<PlainRow>(v, first, last, rows, out, stride);
  else few_rows_product<Fp8Row>(v, first, last, rows, out, stride);
}

}  // namespace
}  // namespace ISA
