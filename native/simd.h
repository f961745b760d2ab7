// Vectors of floats as wide as the instruction set, and conversions between the formats. Units define ISA, a namespace.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline vf load_bf16(const uint16_t* p) {
#if defined(__SSE2__) && !defined(__AVX2__)  // GCC takes seven instructions for what needs two
  return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  vh half = *reinterpret_cast<const vh_any*>(p);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline vh to_bf16(vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  vu nan = (bits >> 16) | 0x40;
  vu is_nan = (vu)(x != x);
  return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vh);
}

inline void store_bf16(uint16_t* p, vf x) { *reinterpret_cast<vh_any*>(p) = to_bf16(x); }

inline vf round_bf16(vf x) { return (vf)(__builtin_convertvector(to_bf16(x), vu) << 16); }

inline void round_row(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store_bf16(y + i, load(x + i));
  for (; i < n; i++) y[i] = to_bf16(x[i]);
}

inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
#endif
}

inline vf maximum(vf a, vf b) {
  vi greater = a > b;
  return (vf)(((vi)a & greater) | ((vi)b & ~greater));
}

inline float maximum_lane(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
  float largest = x[0];
  for (int i = 1; i < W; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

inline bool any(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  int32_t bits = 0;
  for (int i = 0; i < W; i++) bits |= x[i];
  return bits != 0;
#endif
}

// e^x to about 2 units in the last place of FP32; 0 below -87, infinity above 88.7.
inline vf exponential(vf x) {
  vf clamped = maximum(x, splat(-87.3f));
  clamped = -maximum(-clamped, splat(-88.8f));
  vf n = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  vi exponent = (vi)n - 0x4B400000;
  n = n - 12582912.0f;
  vf r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  // Two factors, so that the exponent 128 is reached by way of a finite number.
  vi half = exponent >> 1;
  vf result = p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
  vi tiny = x < -87.3f, nan = x != x;
  result = (vf)((vi)result & ~tiny);
  return (vf)(((vi)result & ~nan) | ((vi)x & nan));
}

inline float from_e4m3(uint8_t code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float magnitude;
  if (exponent == 15 && mantissa == 7) magnitude = __builtin_nanf("");
  else if (exponent == 0) magnitude = mantissa * 0.001953125f;
  else {
    uint32_t bits = static_cast<uint32_t>(exponent + 120) << 23 | static_cast<uint32_t>(mantissa) << 20;
    __builtin_memcpy(&magnitude, &bits, 4);
  }
  return code & 0x80 ? -magnitude : magnitude;
}

// W bytes as integers. (GCC 12 takes what __builtin_convertvector makes of unaligned bytes one by one.)
inline vu widened(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vu);
#endif
}

// W values. Subnormals by way of a normal number: arithmetic on FP32's own is slow on some processors.
inline vf from_e4m3(const uint8_t* p) {
  const vu code = widened(p), magnitude = (code & 127) << 20;
  const vf normal = (vf)(magnitude + (120u << 23)), small = (vf)(magnitude + (121u << 23)) - 0.015625f;
  const vi is_small = (vi)magnitude < (1 << 23), nan = (vi)magnitude == (127 << 20);
  const vi bits = ((vi)small & is_small) | ((vi)normal & ~is_small) | (nan & 0x7fc00000);
  return (vf)(bits | (vi)((code & 128) << 24));
}

// Nearest E4M3 of a value in [0, 448], ties to even.
inline uint8_t to_e4m3(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return 0x7f;
  if (x < 0.015625f) return static_cast<uint8_t>(__builtin_lrintf(x * 512.0f));  // subnormal; 8 is the first normal
  uint32_t rounded = bits + 0x7ffff + (bits >> 20 & 1);
  return static_cast<uint8_t>((rounded >> 20) - (120 << 3));
}

#define INLINED __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // arrays of vectors must become registers

template <int N>
struct Number {
  constexpr operator int() const { return N; }
};

// f(0), ..., f(N - 1) with constants, so that arrays indexed by them become registers.
template <int N, int I = 0, class F>
INLINED inline void each(const F& f) {
  if constexpr (I < N) {
    f(Number<I>());
    each<N, I + 1>(f);
  }
}

// Into the second cache, whose queue of requests to memory is longer than the first one's. Calls to a function that does
// nothing else may be dropped by the compiler, so that it must be inlined early.
INLINED inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// What is fetched ahead of its use may lie behind the end of an object, or in another one: no pointer gets there by
// arithmetic, a number does.
typedef uintptr_t Address;
INLINED inline Address address(const void* p) { return reinterpret_cast<Address>(p); }
INLINED inline void fetch(Address a) { fetch(reinterpret_cast<const void*>(a)); }
INLINED inline void fetch_bytes(Address a, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) fetch(a + i);
}

// A closure of this unit's own for every item, on the pool.
template <class Task>
inline void parallel(int threads, int64_t items, const Task& task) {
  if (items <= 0) return;
  run_parallel(
      threads, items, [](void* context, int64_t item) { (*static_cast<const Task*>(context))(item); },
      const_cast<Task*>(&task));
}

// Threads that shorten a task of so many bytes read and multiplications: meeting one that is awake costs one or two
// microseconds.
inline int useful_threads(int threads, int64_t bytes, int64_t products) {
  const int64_t worth = bytes / 60000 + products / 300000;  // of about 2 microseconds each
  return worth < threads ? (worth < 1 ? 1 : static_cast<int>(worth)) : threads;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace ISA
