// Products of NVFP4 weights with a few rows of activations, with AVX-512.
//
// A block of 16 is a lane. 256 inputs of a weight row are two vectors of packed weights; one shuffle of them takes the
// blocks' first halves, another the second, so that the block scales are one vector, applied once for 256 inputs.
#pragma once
#include "decode_avx512.h"

namespace ISA {
namespace {

template <int HALF>
INLINED inline __m512i block_halves(__m512i first, __m512i second) {
  return (__m512i)_mm512_shuffle_ps((__m512)first, (__m512)second, HALF ? 0xdd : 0x88);
}

// Scales in the lanes that block_halves() puts their blocks in: lane_of().
INLINED inline __m512 lane_scales(__m128i bytes) {
  return scales16(_mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)));
}
INLINED inline __m512 lane_scales(const uint8_t* p) {
  return lane_scales(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// total += a . b, where it is written: the compiler would move products and then lack registers for their sums.
#define DOT_HERE(total, a, b) asm volatile("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b))
#define CODE_DOT_HERE(total, a, b) asm volatile("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b))

// O weight rows at a chunk of inputs.
struct Chunk {
  const uint8_t *values, *scale;
  int64_t row_bytes, scale_cols;
};

// t[c][o][r] = C chunks of O weight rows, times R rows of activations at x[r] + at, before the block scales. Fetches as
// many bytes from `next` on as the chunks have.
template <int O, int R, int C>
INLINED inline void bf16_products(
    const Chunk& w, Address next, __m512i table, const uint8_t* const* x, int64_t at, int64_t step,
    __m512 (&t)[C][O][R]) {
  each<C>([&](auto c) INLINED {
    each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { t[c][o][r] = _mm512_setzero_ps(); }); });
  });
  each<2>([&](auto h) INLINED {
    __m512i half[C][O];
    each<C>([&](auto c) INLINED {
      each<O>([&](auto o) INLINED {
        const uint8_t* p = w.values + o * w.row_bytes + c * 128;
        half[c][o] = block_halves<h>(load_now(p), load_now(p + 64));
      });
    });
    each<4>([&](auto j) INLINED {
      // Spread out: several at once would hold up the loads behind them.
      constexpr int LINES = C * O >= 4 ? C * O / 4 : j == 0 ? C * O : 0;
      each<LINES>([&](auto i) INLINED { fetch(next + (h * C * O + j * LINES + i) * 64); });
      each<C>([&](auto c) INLINED {
        __m512i d[O];
        each<O>([&](auto o) INLINED {
          d[o] = _mm512_permutexvar_epi16(_mm512_srli_epi16(half[c][o], j * 4), table);
        });
        each<R>([&](auto r) INLINED {
          const __m512i values = load_now(x[r] + at + c * step + (h * 4 + j) * 64);
          each<O>([&](auto o) INLINED { DOT_HERE(t[c][o][r], d[o], values); });
        });
      });
    });
  });
}

// A chunk of O weight rows as bytes 12 above twice their values; with activations in CODES a block's sum is an exact integer.
template <int O>
struct Codes {
  __m512i quarter[4][O];
};
template <int O>
INLINED inline Codes<O> decode_codes(const Chunk& w, Address next, __m512i table) {
  Codes<O> codes;
  each<O>([&](auto o) INLINED {
    const uint8_t* p = w.values + o * w.row_bytes;
    fetch(next + o * 128);
    fetch(next + o * 128 + 64);
    const __m512i first = load_now(p), second = load_now(p + 64);
    each<2>([&](auto h) INLINED {
      const __m512i half = block_halves<h>(first, second);
      codes.quarter[h * 2][o] = _mm512_permutexvar_epi8(half, table);
      codes.quarter[h * 2 + 1][o] = _mm512_permutexvar_epi8(_mm512_srli_epi16(half, 4), table);
    });
  });
  return codes;
}

// t[o] = one row of activations in CODES, times O weight rows, before the scales.
template <int O>
INLINED inline void code_products(const Codes<O>& w, const uint8_t* x, __m512i (&t)[O]) {
  // (w + 12) x - 12 x: the unsigned operand needs the offset, the sums' start takes it out again.
  const __m512i start = load_now(x + CODES_SUM);
  each<O>([&](auto o) INLINED { t[o] = start; });
  each<4>([&](auto j) INLINED {
    const __m512i values = load_now(x + j * 64);
    each<O>([&](auto o) INLINED { CODE_DOT_HERE(t[o], w.quarter[j][o], values); });
  });
}

// Calls multiply(count, chunk, weights) for chunks [begin, end) of O weight rows: STEP of them at a time, then singly, and
// what is left of a last one as a copy padded with zeros.
template <int O, int STEP, class F>
INLINED inline void for_chunks(const View& v, int64_t row, int64_t begin, int64_t end, const F& multiply) {
  Chunk w{v.values + row * v.row_bytes + begin * 128, v.scale + row * v.scale_cols + begin * 16, v.row_bytes, v.scale_cols};
  const int64_t whole = end * CHUNK <= v.in ? end : end - 1;
  int64_t chunk = begin;
  for (; chunk + STEP <= whole; chunk += STEP) {
    multiply(Number<STEP>(), chunk, w);
    w.values += STEP * 128;
    w.scale += STEP * 16;
  }
  if constexpr (STEP > 1)
    for (; chunk < whole; chunk++) {
      multiply(Number<1>(), chunk, w);
      w.values += 128;
      w.scale += 16;
    }
  if (chunk < end) {
    const int64_t blocks = v.in / 16 - chunk * 16;
    alignas(64) uint8_t values[O][128] = {}, scales[O][16] = {};
    for (int o = 0; o < O; o++) {
      __builtin_memcpy(values[o], w.values + o * v.row_bytes, blocks * 8);
      __builtin_memcpy(scales[o], w.scale + o * v.scale_cols, blocks);
    }
    multiply(Number<1>(), chunk, Chunk{values[0], scales[0], 128, 16});
  }
}

// add(o, r, t, scale) for each chunk in its order, output and row: t is the product, still without the block scales.
template <int O, int R, int COUNT, bool CODED, class F>
INLINED inline void multiply_chunks(
    const Chunk& w, Address next, __m512i table, const uint8_t* const* x, int64_t at, int64_t step, const F& add) {
  if constexpr (CODED) {
    const Codes<O> codes = decode_codes<O>(w, next, table);
    __m512 scale[O];
    each<O>([&](auto o) INLINED { scale[o] = lane_scales(w.scale + o * w.scale_cols); });
    each<R>([&](auto r) INLINED {
      __m512i t[O];
      code_products<O>(codes, x[r] + at, t);
      const __m512 x_scale = (__m512)load_now(x[r] + at + CODES_SCALE);
      each<O>([&](auto o) INLINED { add(o, r, _mm512_cvtepi32_ps(t[o]), _mm512_mul_ps(scale[o], x_scale)); });
    });
  } else {
    __m512 t[COUNT][O][R];
    bf16_products<O, R, COUNT>(w, next, table, x, at, step, t);
    each<COUNT>([&](auto c) INLINED {
      each<O>([&](auto o) INLINED {
        const __m512 scale = lane_scales(w.scale + o * w.scale_cols + c * 16);
        each<R>([&](auto r) INLINED { add(o, r, t[c][o][r], scale); });
      });
    });
  }
}

// A group's outputs by one or two rows of activations: weights are read in the order that they lie in, which memory likes
// best.
template <int R, bool CODED>
__attribute__((noinline)) void nvfp4_in_order(
    FewRows& f, int64_t group, int64_t stop, Address next, Address next_scale) {
  constexpr int STEP = CODED ? 1 : 4;  // chunks whose sums are under way at once
  const View& v = f.v;
  const __m512i table = CODED ? e2m1_bytes() : e2m1_halves();
  const int64_t chunks = ceil_div(v.in, CHUNK), step = f.x_step;
  for (int64_t row = group; row < stop; row++) {
    fetch_bytes(next_scale, v.scale_cols);
    next_scale += v.scale_cols;
    __m512 total[R];
    each<R>([&](auto r) INLINED { total[r] = _mm512_setzero_ps(); });
    for_chunks<1, STEP>(v, row, 0, chunks, [&](auto count, int64_t chunk, const Chunk& w) INLINED {
      multiply_chunks<1, R, count, CODED>(
          w, next, table, f.x, chunk * step, step,
          [&](auto, auto r, __m512 t, __m512 scale) INLINED { total[r] = _mm512_fmadd_ps(t, scale, total[r]); });
      next += count * 128;
    });
    each<R>([&](auto r) INLINED { f.sums[r * GROUP + row - group] = total[r]; });
  }
  for (int64_t i = stop - group; i < GROUP; i++)
    each<R>([&](auto r) INLINED { f.sums[r * GROUP + i] = _mm512_setzero_ps(); });
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < stop - group; i += 4) {
      const __m512* const s = f.sums + r * GROUP + i;
      float* const out = f.out + r * f.stride + group - f.first + i;
      alignas(16) float results[4];
      _mm_store_ps(results, sum_lanes(s[0], s[1], s[2], s[3]));
      for (int64_t k = 0; k < 4 && i + k < stop - group; k++) out[k] = results[k] * f.factor;
    }
}

// Every case is a function of its own, with the registers for itself.
template <int O, int R, bool CODED>
__attribute__((noinline)) void nvfp4_turn(FewRows& f, const Turn& turn) {
  constexpr bool WAIT = O * R > 8;  // more sums than there are registers for: they wait in memory between chunks
  const View& v = f.v;
  const __m512i table = CODED ? e2m1_bytes() : e2m1_halves();
  const int64_t step = f.x_step;
  Address next = turn.next, next_scale = turn.next_scale;
  for (int64_t row = turn.row; row + O <= turn.stop; row += O) {
    __m512* const sums = f.sums_of(turn, row);
    __m512 total[O][R];
    if constexpr (!WAIT) load_sums(turn, sums, total);
    else if (turn.begin == 0)
      each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { sums[o * BATCH + r] = _mm512_setzero_ps(); }); });
    fetch_bytes(next_scale, (turn.end - turn.begin) * O * 16);
    next_scale += (turn.end - turn.begin) * O * 16;
    for_chunks<O, 1>(v, row, turn.begin, turn.end, [&](auto, int64_t chunk, const Chunk& w) INLINED {
      multiply_chunks<O, R, 1, CODED>(
          w, next, table, f.x + turn.r0, chunk * step, step, [&](auto o, auto r, __m512 t, __m512 scale) INLINED {
            __m512* const sum = sums + o * BATCH + r;
            if constexpr (WAIT) *sum = _mm512_fmadd_ps(t, scale, (__m512)load_now(reinterpret_cast<const uint8_t*>(sum)));
            else total[o][r] = _mm512_fmadd_ps(t, scale, total[o][r]);
          });
      next += O * 128;
    });
    if constexpr (WAIT) {
      if (turn.end * CHUNK < v.in) continue;
      each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { total[o][r] = sums[o * BATCH + r]; }); });
    }
    store_sums(f, turn, row, sums, total);
  }
}

}  // namespace
}  // namespace ISA
