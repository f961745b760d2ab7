// Products of few rows with AVX-512, for which memory decides.
//
// Weights are decoded in registers as they stream by, and a result is the sum over one vector's lanes. Each result is
// computed in the same order whatever the number of rows.
#pragma once
#include "nvfp4_avx512.h"

namespace ISA {
namespace {

// x of FP8 weights in UNPACKED.
template <int O, int R>
__attribute__((noinline)) void fp8_turn(FewRows& f, const Turn& turn) {
  const View& v = f.v;
  const E4m3Tables tables = e4m3_tables();
  Address next = turn.next;
  const uint8_t* const* x = f.x + turn.r0;
  const int64_t width = v.scale ? v.block_cols : v.in, last = turn.end * CHUNK < v.in ? turn.end * CHUNK : v.in;
  for (int64_t row = turn.row; row + O <= turn.stop; row += O) {
    const uint8_t* const w = v.values + row * v.row_bytes;
    __m512* const sums = f.sums_of(turn, row);
    __m512 total[O][R];
    load_sums(turn, sums, total);
    for (int64_t c = turn.begin * CHUNK; c < last; c += width) {
      const int64_t stop = c + width < last ? c + width : last;
      __m512 part[O][R] = {};
      for (int64_t k = c; k < stop; k += 64) {
        const int64_t at = k / CHUNK * f.x_step + k % CHUNK * 2;
        const __mmask64 mask = stop - k >= 64 ? ~0ull : (1ull << (stop - k)) - 1;
        __m512i d[2][O];
        UNROLL for (int o = 0; o < O; o++) {
          fetch(next + o * 64);
          const __m512i bytes = _mm512_maskz_loadu_epi8(mask, w + o * v.row_bytes + k);
          const __m512i high = e4m3_high(tables, bytes), low = e4m3_low(tables, bytes);
          d[0][o] = _mm512_unpacklo_epi8(low, high);
          d[1][o] = _mm512_unpackhi_epi8(low, high);
        }
        next += O * 64;
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int j = 0; j < 2; j++) {
            const __m512i values = load_now(x[r] + at + j * 64);
            UNROLL for (int o = 0; o < O; o++) part[o][r] = dot(part[o][r], d[j][o], values);
          }
      }
      UNROLL for (int o = 0; o < O; o++) {
        const __m512 s = _mm512_set1_ps(block_scale(v, row + o, c / width));
        UNROLL for (int r = 0; r < R; r++) total[o][r] = _mm512_fmadd_ps(part[o][r], s, total[o][r]);
      }
    }
    store_sums(f, turn, row, sums, total);
  }
}

// x of BF16 weights in HALVES.
template <int O, int R>
__attribute__((noinline)) void plain_turn(FewRows& f, const Turn& turn) {
  const View& v = f.v;
  Address next = turn.next;
  const uint8_t* const* x = f.x + turn.r0;
  const int64_t last = turn.end * CHUNK < v.in ? turn.end * CHUNK : v.in;
  for (int64_t row = turn.row; row + O <= turn.stop; row += O) {
    const uint8_t* const w = v.values + row * v.row_bytes;
    __m512* const sums = f.sums_of(turn, row);
    __m512 total[O][R];
    load_sums(turn, sums, total);
    for (int64_t k = turn.begin * CHUNK; k < last; k += 32) {
      const __mmask32 mask = last - k >= 32 ? ~0u : (1u << (last - k)) - 1;
      const int64_t at = k / CHUNK * f.x_step + k % CHUNK * 2;
      __m512i d[O];
      UNROLL for (int o = 0; o < O; o++) {
        fetch(next + o * 64);
        d[o] = _mm512_maskz_loadu_epi16(mask, w + o * v.row_bytes + k * 2);
      }
      next += O * 64;
      UNROLL for (int r = 0; r < R; r++) {
        const __m512i values = load_now(x[r] + at);
        UNROLL for (int o = 0; o < O; o++) total[o][r] = dot(total[o][r], d[o], values);
      }
    }
    store_sums(f, turn, row, sums, total);
  }
}

// As many rows of activations at once, up to 4, as spread them evenly. Returns how many.
template <int O, Format FORMAT, bool CODED>
inline int64_t turn_of_rows(FewRows& f, const Turn& turn, int64_t left) {
  const int64_t count = left <= 4 ? left : left < 8 ? (left + 1) / 2 : 4;
  each<4>([&](auto r) INLINED {
    if (count != r + 1) return;
    if constexpr (FORMAT == NVFP4) nvfp4_turn<O, r + 1, CODED>(f, turn);
    else if constexpr (FORMAT == FP8_BLOCK) fp8_turn<O, r + 1>(f, turn);
    else plain_turn<O, r + 1>(f, turn);
  });
  return count;
}

// Inputs that the turns are cut at: whole chunks and whole scale blocks, or sums would depend on the number of rows.
inline int64_t cut_of(const View& v) {
  const int64_t width = v.format == FP8_BLOCK && v.scale ? v.block_cols : CHUNK;
  return width % CHUNK == 0 ? width : CHUNK % width == 0 ? CHUNK : v.in;
}

// Rows [r0, r0 + count), count <= BATCH.
template <Format FORMAT, bool CODED>
inline void few_rows_product(
    const View& v, int64_t first, int64_t last, const Rows& rows, int64_t r0, int64_t count, float* out, int64_t stride) {
  constexpr int64_t NEAR = 24576;  // bytes of activations that stay in the first cache while weights pass by
  constexpr int64_t CHUNK_BYTES = FORMAT == NVFP4 ? CHUNK / 2 : FORMAT == FP8_BLOCK ? CHUNK : CHUNK * 2;
  // Outputs at once: as many as registers hold sums for, but memory prefers to be read in order, one after the other.
  constexpr int MOST = FORMAT == FP8_BLOCK ? 2 : 4;
  const int64_t outputs = FORMAT == NVFP4 ? 4 : count == 1 ? 1 : FORMAT == PLAIN && count > 8 ? 4 : 2;
  FewRows f(v, rows, r0, count, out + r0 * stride, stride, first);
  const int64_t chunks = ceil_div(v.in, CHUNK), bytes = count * rows.row_bytes, cut = ceil_div(cut_of(v), CHUNK);
  const bool in_order = chunks >= 4 && (count == 1 || (count == 2 && bytes * chunks <= 32768));
  const bool turns = count > 1 && bytes * chunks > NEAR;
  const int64_t length = !turns ? chunks : bytes * cut < NEAR ? NEAR / (bytes * cut) * cut : cut;
  const int64_t ahead = ceil_div(v.ahead, GROUP * v.row_bytes) * GROUP;  // weight rows
  for (int64_t group = first; group < last; group += GROUP) {
    const int64_t stop = group + GROUP < last ? group + GROUP : last;
    Address next = address(v.values) + (group + ahead) * v.row_bytes;
    Address next_scale = FORMAT == NVFP4 ? address(v.scale) + (group + ahead) * v.scale_cols : next;
    if (next >= v.end) next += v.jump, next_scale += v.scale_jump;
    if constexpr (FORMAT == NVFP4)
      if (in_order) {
        if (count == 1) nvfp4_in_order<1, CODED>(f, group, stop, next, next_scale);
        else nvfp4_in_order<2, CODED>(f, group, stop, next, next_scale);
        continue;
      }
    const int64_t whole = (stop - group) / outputs * outputs;  // outputs that come as many at once; the rest singly
    for (int64_t begin = 0; begin < chunks; begin += length) {
      const int64_t end = begin + length < chunks ? begin + length : chunks;
      const int64_t done = begin * (stop - group), rest = done + whole * (end - begin);  // chunks of the group
      for (int64_t r = 0; r < count;) {
        const Turn most{begin, end, group, group + whole, r, next + done * CHUNK_BYTES, next_scale + done * 16};
        const Turn others{begin, end, group + whole, stop, r, next + rest * CHUNK_BYTES, next_scale + rest * 16};
        if (whole < stop - group) turn_of_rows<1, FORMAT, CODED>(f, others, count - r);
        if (outputs == MOST) r += turn_of_rows<MOST, FORMAT, CODED>(f, most, count - r);
        else if (FORMAT == PLAIN && outputs == 2) r += turn_of_rows<2, FORMAT, CODED>(f, most, count - r);
        else r += turn_of_rows<1, FORMAT, CODED>(f, most, count - r);
      }
    }
  }
}

// out[r * stride + o - first], o in [first, last), rows in dot_layout.
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows.count; r += BATCH) {
    const int64_t count = rows.count - r < BATCH ? rows.count - r : BATCH;
    if (v.format == FP8_BLOCK) few_rows_product<FP8_BLOCK, false>(v, first, last, rows, r, count, out, stride);
    else if (v.format == PLAIN) few_rows_product<PLAIN, false>(v, first, last, rows, r, count, out, stride);
    else if (v.activations != AS_BF16) few_rows_product<NVFP4, true>(v, first, last, rows, r, count, out, stride);
    else few_rows_product<NVFP4, false>(v, first, last, rows, r, count, out, stride);
  }
}

}  // namespace
}  // namespace ISA
