// Decoding in registers with AVX-512 BF16, VNNI and VBMI, and what the products are made of.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

constexpr int64_t GROUP = 8;   // outputs that take turns at a block of inputs
constexpr int64_t BATCH = 16;  // rows of activations at a time

inline Layout dot_layout(const Weight& weight) {
  if (weight.format == NVFP4) return weight.activations == AS_BF16 ? QUADS : CODES;
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

// The sum over the lanes of each of four vectors.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 four = _mm512_add_ps(
      (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// Outputs take turns at a block of inputs. One turn: chunks [begin, end), weight rows [row, stop), O at a time while there
// are so many, and R rows of activations from r0 on. What to fetch from memory meanwhile lies at next and next_scale: as
// many bytes as are multiplied, in the order that they lie in.
struct Turn {
  int64_t begin, end, row, stop, r0;
  Address next, next_scale;
};

// A product of up to BATCH rows: what all its turns share. out[r * stride + row - first].
struct FewRows {
  const View& v;
  const uint8_t* x[BATCH];
  int64_t x_step;
  float factor;
  float* out;
  int64_t stride, first;
  __m512 sums[GROUP * BATCH];  // of a group's earlier chunks

  FewRows(const View& v, const Rows& rows, int64_t r0, int64_t count, float* out, int64_t stride, int64_t first)
      : v(v), x_step(rows.step), factor(v.factor), out(out), stride(stride), first(first) {
    if (v.format == NVFP4) factor *= SCALE_SHIFT * code_factor(v);
    for (int64_t r = 0; r < count; r++) x[r] = rows.at(r0 + r);
  }
  // Those of output row + o and row r of the turn at o * BATCH + r.
  __m512* sums_of(const Turn& turn, int64_t row) { return sums + (row - first) % GROUP * BATCH + turn.r0; }
};

// Where these chunks are not the first, the sums of the earlier ones.
template <int O, int R>
INLINED inline void load_sums(const Turn& turn, const __m512* sums, __m512 (&total)[O][R]) {
  each<O>([&](auto o) INLINED {
    each<R>([&](auto r) INLINED { total[o][r] = turn.begin ? sums[o * BATCH + r] : _mm512_setzero_ps(); });
  });
}

// Where these chunks are not the last, the sums into memory; else the results of O outputs from `row` on.
template <int O, int R>
INLINED inline void store_sums(
    const FewRows& f, const Turn& turn, int64_t row, __m512* sums, const __m512 (&total)[O][R]) {
  if (turn.end * CHUNK < f.v.in) {
    each<O>([&](auto o) INLINED { each<R>([&](auto r) INLINED { sums[o * BATCH + r] = total[o][r]; }); });
    return;
  }
  const __m128 factor = _mm_set1_ps(f.factor);
  float* const out = f.out + turn.r0 * f.stride + row - f.first;
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

}  // namespace
}  // namespace ISA
