// Decoding with AVX-512 BF16, VNNI and VBMI, and products of few rows.
//
// Weights are decoded in registers as they stream from memory, and a result is the sum over one vector's lanes. Each
// result is computed in the same order whatever the number of rows.

#define UNROLL _Pragma("GCC unroll 16")  // arrays of vectors must become registers

constexpr int64_t FEW_ROWS = 16;

inline Layout dot_layout(const Weight& weight) {
  if (weight.format == NVFP4) return weight.input_scale > 0 ? CODES : QUADS;
  return weight.format == FP8_BLOCK ? UNPACKED : HALVES;
}

inline Layout layout_for(const Weight& weight, int64_t rows) {
  Layout layout = dot_layout(weight);
  return rows <= FEW_ROWS || layout == CODES ? layout : HALVES;
}

// E2M1 as BF16, twice: the index's fifth bit is a neighbour's and must not matter.
inline __m512i e2m1_halves() {
  const __m512i table = _mm512_castsi256_si512(_mm256_setr_epi16(
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<short>(0x8000),
      static_cast<short>(0xbf00), static_cast<short>(0xbf80), static_cast<short>(0xbfc0), static_cast<short>(0xc000),
      static_cast<short>(0xc040), static_cast<short>(0xc080), static_cast<short>(0xc0c0)));
  return _mm512_shuffle_i64x2(table, table, 0x44);
}

// 12 plus twice the E2M1 value, four times: the index's bits 4 and 5 are a neighbour's.
inline __m512i e2m1_bytes() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

// 16 E4M3 scales as FP32, times 2^-8: the bits are those of an FP16 number.
constexpr float SCALE_SHIFT = 256.0f;
inline __m512 scales16(__m128i bytes) {
  __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(0xbfff))));
}

// BF16 bits of every E4M3 magnitude: high and low bytes.
struct E4m3Tables {
  __m512i high[2], low[2];
};
struct E4m3Bytes {
  alignas(64) uint8_t high[128], low[128];
};
constexpr E4m3Bytes e4m3_bytes() {
  E4m3Bytes t{};
  for (int code = 0; code < 128; code++) {
    int exponent = code >> 3, mantissa = code & 7, bits = 0;
    if (code == 127) bits = 0x7fc0;
    else if (exponent > 0) bits = (exponent + 120) << 7 | mantissa << 4;
    else if (mantissa) {
      int shift = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // mantissa * 2^-9
      bits = (118 + shift) << 7 | ((mantissa << (7 - shift)) & 127);
    }
    t.high[code] = static_cast<uint8_t>(bits >> 8);
    t.low[code] = static_cast<uint8_t>(bits & 255);
  }
  return t;
}
alignas(64) inline constexpr E4m3Bytes E4M3_BYTES = e4m3_bytes();
inline E4m3Tables e4m3_tables() {
  return {{_mm512_load_si512(E4M3_BYTES.high), _mm512_load_si512(E4M3_BYTES.high + 64)},
          {_mm512_load_si512(E4M3_BYTES.low), _mm512_load_si512(E4M3_BYTES.low + 64)}};
}
// The high byte carries the sign: bit 7 of the code.
inline __m512i e4m3_high(const E4m3Tables& t, __m512i v) {
  __m512i magnitude = _mm512_permutex2var_epi8(t.high[0], v, t.high[1]);
  return _mm512_ternarylogic_epi32(magnitude, v, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // a | (b & c)
}
inline __m512i e4m3_low(const E4m3Tables& t, __m512i v) { return _mm512_permutex2var_epi8(t.low[0], v, t.low[1]); }

// n values as BF16.
inline void decode_e4m3(const uint8_t* from, int64_t n, uint16_t* to) {
  const E4m3Tables tables = e4m3_tables();
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 mask = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(mask, from + i);
    const __m512i high = e4m3_high(tables, bytes), low = e4m3_low(tables, bytes);
    const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
    _mm512_mask_storeu_epi16(to + i, static_cast<__mmask32>(mask), _mm512_permutex2var_epi64(a, first, b));
    if (n - i > 32)
      _mm512_mask_storeu_epi16(to + i + 32, static_cast<__mmask32>(mask >> 32), _mm512_permutex2var_epi64(a, second, b));
  }
}

inline __m512 dot(__m512 total, __m512i a, __m512i b) { return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b); }

// dot() with its last operand in memory. Left to itself the compiler loads all rows' vectors first and then has no
// registers for the sums.
inline __m512 dot_at(__m512 total, __m512i a, const uint8_t* p) {
#if defined(__SANITIZE_ADDRESS__)
  return dot(total, a, _mm512_loadu_si512(p));
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "m"(*reinterpret_cast<const uint8_t(*)[64]>(p)));
  return total;
#endif
}

// A load that stays where it is written: hoisted ones would take the sums' registers.
inline __m512i load_now(const uint8_t* p) {
#if defined(__SANITIZE_ADDRESS__)
  return _mm512_loadu_si512(p);
#else
  __m512i value;
  asm("vmovdqu64 %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const uint8_t(*)[64]>(p)));
  return value;
#endif
}

#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define INLINED __attribute__((always_inline))

template <int N>
struct Number {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// f(0), ..., f(N - 1) with constants, so that arrays indexed by them become registers.
template <int N, int I = 0, class F>
ALWAYS_INLINE void each(const F& f) {
  if constexpr (I < N) {
    f(Number<I>());
    each<N, I + 1>(f);
  }
}

// Into the second cache, whose queue of requests to memory is longer than the first one's.
// Always inline: a compiler that sees a function of nothing but a prefetch may drop the calls.
ALWAYS_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

template <int O, int R>
inline void fp8_dots(const View& v, int64_t row, const uint8_t* const* x, int64_t x_step, float* out, int64_t stride) {
  const E4m3Tables tables = e4m3_tables();
  const uint8_t* w = v.values + row * v.row_bytes;
  const int64_t width = v.scale ? v.block_cols : v.in, ahead = ahead_of(v, w).values;
  __m512 total[O][R] = {};
  for (int64_t c = 0; c < v.in; c += width) {
    const int64_t stop = c + width < v.in ? c + width : v.in;
    __m512 part[O][R] = {};
    for (int64_t k = c; k < stop; k += 64) {
      const int64_t at = k / CHUNK * x_step + k % CHUNK * 2;
      const __mmask64 mask = stop - k >= 64 ? ~0ull : (1ull << (stop - k)) - 1;
      __m512i d[2][O];
      UNROLL for (int o = 0; o < O; o++) {
        const uint8_t* p = w + o * v.row_bytes + k;
        fetch(p + ahead);
        const __m512i bytes = _mm512_maskz_loadu_epi8(mask, p);
        const __m512i high = e4m3_high(tables, bytes), low = e4m3_low(tables, bytes);
        d[0][o] = _mm512_unpacklo_epi8(low, high);
        d[1][o] = _mm512_unpackhi_epi8(low, high);
      }
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
  UNROLL for (int o = 0; o < O; o++)
    UNROLL for (int r = 0; r < R; r++) out[r * stride + o] = _mm512_reduce_add_ps(total[o][r]) * v.factor;
}

template <int O, int R>
inline void plain_dots(const View& v, int64_t row, const uint8_t* const* x, int64_t x_step, float* out, int64_t stride) {
  const uint8_t* w = v.values + row * v.row_bytes;
  const int64_t ahead = ahead_of(v, w).values;
  __m512 total[O][R] = {};
  for (int64_t k = 0; k < v.in; k += 32) {
    const __mmask32 mask = v.in - k >= 32 ? ~0u : (1u << (v.in - k)) - 1;
    const int64_t at = k / CHUNK * x_step + k % CHUNK * 2;
    __m512i d[O];
    UNROLL for (int o = 0; o < O; o++) {
      const uint8_t* p = w + o * v.row_bytes + k * 2;
      fetch(p + ahead);
      d[o] = _mm512_maskz_loadu_epi16(mask, p);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const __m512i values = load_now(x[r] + at);
      UNROLL for (int o = 0; o < O; o++) total[o][r] = dot(total[o][r], d[o], values);
    }
  }
  UNROLL for (int o = 0; o < O; o++)
    UNROLL for (int r = 0; r < R; r++) out[r * stride + o] = _mm512_reduce_add_ps(total[o][r]) * v.factor;
}

#include "nvfp4_avx512.h"

// O outputs by all rows, as many of them at once as the registers hold sums for.
template <int O, int MOST, Format FORMAT>
inline void dots_of_rows(const View& v, int64_t row, const Rows& rows, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows.count;) {
    const uint8_t* x[MOST];
    const int64_t left = rows.count - r, count = left < MOST ? left : MOST;
    for (int64_t i = 0; i < count; i++) x[i] = rows.at(r + i);
    auto times = [&](auto number) {
      constexpr int R = decltype(number)::value;
      if constexpr (R <= MOST) {
        if constexpr (FORMAT == FP8_BLOCK) fp8_dots<O, R>(v, row, x, rows.step, out + r * stride, stride);
        else plain_dots<O, R>(v, row, x, rows.step, out + r * stride, stride);
      }
    };
    if (count == 1) times(Number<1>());
    else if (count == 2) times(Number<2>());
    else if (count == 3) times(Number<3>());
    else times(Number<4>());
    r += count;
  }
}

// Sums of O outputs by R rows live in registers, beside O or R operands: O and R are chosen for that, and to be alike,
// because every load is worth a multiplication.
inline void dots_of_outputs(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  for (int64_t o = first; o < last;) {
    const int64_t left = last - o;
    float* to = out + o - first;
    if (v.format == FP8_BLOCK) {
      if (rows.count == 1 && left >= 4) dots_of_rows<4, 1, FP8_BLOCK>(v, o, rows, to, stride), o += 4;
      else if (left >= 2) dots_of_rows<2, 4, FP8_BLOCK>(v, o, rows, to, stride), o += 2;
      else dots_of_rows<1, 4, FP8_BLOCK>(v, o, rows, to, stride), o++;
    } else {
      if (left >= 4) dots_of_rows<4, 4, PLAIN>(v, o, rows, to, stride), o += 4;
      else dots_of_rows<1, 4, PLAIN>(v, o, rows, to, stride), o++;
    }
  }
}

// out[r * stride + o - first], o in [first, last), rows in dot_layout.
inline void dot_product(const View& v, int64_t first, int64_t last, const Rows& rows, float* out, int64_t stride) {
  if (v.format != NVFP4) dots_of_outputs(v, first, last, rows, out, stride);
  else if (v.fp4) few_rows_product<true>(v, first, last, rows, out, stride);
  else few_rows_product<false>(v, first, last, rows, out, stride);
}
