// Products of NVFP4 weights with a few rows of activations, with AVX-512.
//
// A block of 16 is a lane. 256 inputs of a weight row are two vectors of packed weights; one shuffle of them takes the
// blocks' first halves, another the second, so that the block scales are one vector, applied once for 256 inputs. Each
// result is computed in the same order whatever the number of rows.

constexpr int64_t GROUP = 8;  // outputs that take turns at a block of inputs

template <int HALF>
ALWAYS_INLINE __m512i block_halves(__m512i first, __m512i second) {
  return (__m512i)_mm512_shuffle_ps((__m512)first, (__m512)second, HALF ? 0xdd : 0x88);
}

// Scales in the lanes that block_halves() puts their blocks in: lane_of().
ALWAYS_INLINE __m512 lane_scales(__m128i bytes) {
  return scales16(_mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)));
}
ALWAYS_INLINE __m512 lane_scales(const uint8_t* p) {
  return lane_scales(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// total += a . b, where it is written: the compiler would move products and then lack registers for their sums.
#define DOT_HERE(total, a, b) asm volatile("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b))
#define CODE_DOT_HERE(total, a, b) asm volatile("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b))

// The sum over the lanes of each of four vectors.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 four = _mm512_add_ps(
      (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// O weight rows at a chunk of inputs.
struct Chunk {
  const uint8_t *values, *scale;
  int64_t row_bytes, scale_cols;
};

// t[c][o][r] = C chunks of O weight rows, times R rows of activations at x[r] + at, before the block scales. Fetches as
// many bytes from `next` on as the chunks have.
template <int O, int R, int C>
ALWAYS_INLINE void bf16_products(
    const Chunk& w, const uint8_t* next, __m512i table, const uint8_t* const* x, int64_t at, int64_t step,
    __m512 (&t)[C][O][R]) {
  each<C>([&](auto c) INLINED {
    each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { t[c][o][r] = _mm512_setzero_ps(); }); });
  });
  each<2>([&](auto h) INLINED {
    __m512i half[C][O];
    each<C>([&](auto c) INLINED {
      each<O>([&](auto o) INLINED {
        const uint8_t* p = w.values + o * w.row_bytes + c * 128;
        fetch(next + ((h * C + c) * O + o) * 64);
        half[c][o] = block_halves<h>(load_now(p), load_now(p + 64));
      });
    });
    each<4>([&](auto j) INLINED {
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

// A chunk of O weight rows as bytes 12 above twice their values; with FP4 activations a block's sum is an exact integer.
template <int O>
struct Codes {
  __m512i quarter[4][O];
};
template <int O>
ALWAYS_INLINE Codes<O> decode_codes(const Chunk& w, const uint8_t* next, __m512i table) {
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
ALWAYS_INLINE void code_products(const Codes<O>& w, const uint8_t* x, __m512i (&t)[O]) {
  // (w + 12) x - 12 x: the unsigned operand needs the offset, the sums' start takes it out again.
  const __m512i start = load_now(x + CODES_SUM);
  each<O>([&](auto o) INLINED { t[o] = start; });
  each<4>([&](auto j) INLINED {
    const __m512i values = load_now(x + j * 64);
    each<O>([&](auto o) INLINED { CODE_DOT_HERE(t[o], w.quarter[j][o], values); });
  });
}

// A product of few rows: what all its parts share, and their sums while they wait. out[r * stride + row - first].
struct FewRows {
  const View& v;
  const uint8_t* x[FEW_ROWS];
  int64_t x_step;
  float factor;
  float* out;
  int64_t stride, first;
  __m512 sums[GROUP * FEW_ROWS];
};

// Calls multiply(count, chunk, weights) for chunks [begin, end) of O weight rows: STEP of them at a time, then singly, and
// what is left of a last one as a copy padded with zeros.
template <int O, int STEP, class F>
ALWAYS_INLINE void for_chunks(const View& v, int64_t row, int64_t begin, int64_t end, const F& multiply) {
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

// add(c, o, r, t, scale) for the products t of `count` chunks, still without the block scales.
template <int O, int R, int COUNT, bool FP4, class F>
ALWAYS_INLINE void multiply_chunks(
    const Chunk& w, const uint8_t* next, __m512i table, const uint8_t* const* x, int64_t at, int64_t step, const F& add) {
  if constexpr (FP4) {
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

ALWAYS_INLINE void fetch_bytes(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) fetch(p + i);
}

// One row of activations: weights are read in the order that they lie in, which memory likes best.
template <bool FP4>
__attribute__((noinline)) void one_row_group(
    FewRows& f, int64_t group, int64_t stop, const uint8_t* next, const uint8_t* next_scale) {
  constexpr int STEP = FP4 ? 1 : 4;  // chunks whose sums are under way at once
  const View& v = f.v;
  const __m512i table = FP4 ? e2m1_bytes() : e2m1_halves();
  const int64_t chunks = ceil_div(v.in, CHUNK), step = f.x_step;
  for (int64_t row = group; row < stop; row++) {
    fetch_bytes(next_scale, v.scale_cols);
    next_scale += v.scale_cols;
    __m512 total = _mm512_setzero_ps();
    for_chunks<1, STEP>(v, row, 0, chunks, [&](auto count, int64_t chunk, const Chunk& w) INLINED {
      multiply_chunks<1, 1, count, FP4>(
          w, next, table, f.x, chunk * step, step,
          [&](auto, auto, __m512 t, __m512 scale) INLINED { total = _mm512_fmadd_ps(t, scale, total); });
      next += count * 128;
    });
    f.sums[row - group] = total;
  }
  for (int64_t i = 0; i < stop - group; i += 4) {
    alignas(16) float results[4];
    _mm_store_ps(results, sum_lanes(f.sums[i], f.sums[i + 1], f.sums[i + 2], f.sums[i + 3]));
    for (int64_t k = 0; k < 4 && i + k < stop - group; k++) f.out[group - f.first + i + k] = results[k] * f.factor;
  }
}

// Chunks [begin, end) of O weight rows from `row` on, times R rows of activations from r0 on. The rows' sums over earlier
// chunks are sums[r0 + o * FEW_ROWS + r]. Every case is a function of its own, with the registers for itself.
template <int O, int R, bool FP4>
__attribute__((noinline)) void few_rows_part(
    FewRows& f, int64_t row, int64_t r0, int64_t begin, int64_t end, const uint8_t* next, const uint8_t* next_scale,
    __m512* sums) {
  constexpr bool WAIT = O * R > 8;  // more sums than there are registers for: they wait in memory between chunks
  const View& v = f.v;
  const __m512i table = FP4 ? e2m1_bytes() : e2m1_halves();
  const int64_t step = f.x_step;
  sums += r0;
  __m512 total[O][R];
  each<O>([&](auto o) INLINED {
    each<R>([&](auto r) INLINED {
      __m512* const sum = sums + o * FEW_ROWS + r;
      if constexpr (!WAIT) total[o][r] = begin ? *sum : _mm512_setzero_ps();
      else if (begin == 0) *sum = _mm512_setzero_ps();
    });
  });
  fetch_bytes(next_scale, (end - begin) * O * 16);
  for_chunks<O, 1>(v, row, begin, end, [&](auto, int64_t chunk, const Chunk& w) INLINED {
    multiply_chunks<O, R, 1, FP4>(
        w, next, table, f.x + r0, chunk * step, step, [&](auto o, auto r, __m512 t, __m512 scale) INLINED {
          __m512* const sum = sums + o * FEW_ROWS + r;
          if constexpr (WAIT) *sum = _mm512_fmadd_ps(t, scale, (__m512)load_now(reinterpret_cast<const uint8_t*>(sum)));
          else total[o][r] = _mm512_fmadd_ps(t, scale, total[o][r]);
        });
    next += O * 128;
  });
  const bool last = end * CHUNK >= v.in;
  if constexpr (!WAIT) {
    if (!last) each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { sums[o * FEW_ROWS + r] = total[o][r]; }); });
  } else {
    if (last) each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { total[o][r] = sums[o * FEW_ROWS + r]; }); });
  }
  if (!last) return;
  const __m128 factor = _mm_set1_ps(f.factor);
  float* const out = f.out + r0 * f.stride + row - f.first;
  each<(O * R + 3) / 4>([&](auto four) INLINED {
    constexpr int first = four * 4, most = O * R - 1;
    auto sum = [&](auto k) INLINED { constexpr int i = first + k < most ? first + k : most; return total[i % O][i / O]; };
    const __m128 results =
        _mm_mul_ps(sum_lanes(sum(Number<0>()), sum(Number<1>()), sum(Number<2>()), sum(Number<3>())), factor);
    each<4>([&](auto k) INLINED {
      constexpr int i = first + k;
      if constexpr (i <= most) _mm_store_ss(out + i / O * f.stride + i % O, _mm_permute_ps(results, k));
    });
  });
}

// Rows from r0 on, as many of them at once as there are registers for. Returns how many.
template <int O, int MOST, bool FP4>
inline int64_t few_rows_of(
    FewRows& f, int64_t row, int64_t r0, int64_t left, int64_t begin, int64_t end, const uint8_t* next,
    const uint8_t* next_scale, __m512* sums) {
  const int64_t count = left <= MOST ? left : left < 2 * MOST ? (left + 1) / 2 : MOST;
  each<MOST>([&](auto r) INLINED {
    if (count == r + 1) few_rows_part<O, r + 1, FP4>(f, row, r0, begin, end, next, next_scale, sums);
  });
  return count;
}

// out[r * stride + o - first], o in [first, last), rows in dot_layout.
template <bool FP4>
inline void few_rows_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  constexpr int64_t NEAR = 16384;  // of activations, so that they stay in the first cache while weights pass by
  FewRows f{v, {}, rows.step, v.factor * SCALE_SHIFT * (FP4 ? 0.25f : 1.0f), out, stride, first, {}};
  for (int64_t r = 0; r < rows.count; r++) f.x[r] = rows.at(r);
  const int64_t chunks = ceil_div(v.in, CHUNK), bytes = rows.count * rows.row_bytes;
  const int64_t length = bytes * chunks <= NEAR ? chunks : bytes < NEAR ? NEAR / bytes : 1;
  const int64_t ahead = ceil_div(FETCH_AHEAD, GROUP * v.row_bytes) * GROUP;  // rows
  for (int64_t group = first; group < last; group += GROUP) {
    const int64_t stop = group + GROUP < last ? group + GROUP : last;
    const uint8_t* next = v.values + (group + ahead) * v.row_bytes;
    const uint8_t* next_scale = v.scale + (group + ahead) * v.scale_cols;
    if (next >= v.end) next += v.jump, next_scale += v.scale_jump;
    if (rows.count == 1 && chunks >= 4) {
      one_row_group<FP4>(f, group, stop, next, next_scale);
      continue;
    }
    for (int64_t begin = 0; begin < chunks; begin += length) {
      const int64_t end = begin + length < chunks ? begin + length : chunks;
      for (int64_t row = group; row < stop;) {
        const int64_t left = stop - row, outputs = left < 4 ? 1 : 4;
        const int64_t done = begin * (stop - group) + (row - group) * (end - begin);  // chunks of the group
        __m512* const sums = f.sums + (row - group) * FEW_ROWS;
        for (int64_t r = 0; r < rows.count;) {
          const int64_t more = rows.count - r;
          const uint8_t *const p = next + done * 128, *const s = next_scale + done * 16;
          if (outputs == 4) r += few_rows_of<4, 4, FP4>(f, row, r, more, begin, end, p, s, sums);
          else r += few_rows_of<1, 4, FP4>(f, row, r, more, begin, end, p, s, sums);
        }
        row += outputs;
      }
    }
  }
}
