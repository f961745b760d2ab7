// Operations on a few kilobytes: norm, rotary, routing, FP4 rounding. Worth a kernel because a decode step has many.
#pragma once
#include "operand.h"

namespace ISA {
namespace {

inline void norm_row(const uint16_t* x, int64_t n, const uint16_t* weight, float eps, uint16_t* y) {
  vf squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    for (int j = 0; j < 2; j++) {
      vf value = load_bf16(x + i + j * W);
      squares[j] = fma(value, value, squares[j]);
    }
  float total = sum(squares[0] + squares[1]);
  for (; i < n; i++) total += from_bf16(x[i]) * from_bf16(x[i]);
  const float inverse = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i + W <= n; i += W) store_bf16(y + i, load_bf16(weight + i) * round_bf16(load_bf16(x + i) * inverse));
  for (; i < n; i++) y[i] = to_bf16(from_bf16(weight[i]) * from_bf16(to_bf16(from_bf16(x[i]) * inverse)));
}

inline void norm(const NormArgs& a) {
  const int64_t batch = a.n >= 4096 ? 8 : 32768 / (a.n + 1) + 1;
  parallel(useful_threads(a.threads, a.rows * a.n * 8, 0), ceil_div(a.rows, batch), [&](int64_t item) {
    for (int64_t r = item * batch; r < (item + 1) * batch && r < a.rows; r++)
      norm_row(a.x + r * a.x_stride, a.n, a.weight, a.eps, a.y + r * a.n);
  });
}

// Adjacent pairs of d values, turned by d / 2 angles.
inline void rotate(const uint16_t* x, int64_t d, const float* cos, const float* sin, uint16_t* y) {
  for (int64_t i = 0; i < d / 2; i++) {
    const float even = from_bf16(x[2 * i]), odd = from_bf16(x[2 * i + 1]);
    y[2 * i] = to_bf16(even * cos[i] - odd * sin[i]);
    y[2 * i + 1] = to_bf16(even * sin[i] + odd * cos[i]);
  }
}

inline void rotary(const RotaryArgs& a) {
  for (int64_t t = 0; t < a.tokens; t++)
    for (int64_t h = 0; h < a.heads; h++)
      rotate(a.x + t * a.token_stride + h * a.head_stride, a.d, a.cos + t * (a.d / 2), a.sin + t * (a.d / 2),
             a.y + (t * a.heads + h) * a.d);
}

inline void embedding(const EmbeddingArgs& a) {
  for (int64_t t = 0; t < a.tokens; t++)
    if (a.ids[t] < 0 || a.ids[t] >= a.vocab) outside_vocabulary(a.ids[t], a.vocab);
  for (int64_t t = 0; t < a.tokens; t++) __builtin_memcpy(a.y + t * a.n, a.weight + a.ids[t] * a.n, a.n * 2);
}

inline void angles(const AnglesArgs& a) {
  for (int64_t i = 0; i < a.tokens * a.n; i++) {
    const float angle = static_cast<float>(a.positions[i / a.n]) * a.frequencies[i % a.n];
    a.cos[i] = __builtin_cosf(angle) * a.magnitude;
    a.sin[i] = __builtin_sinf(angle) * a.magnitude;
  }
}

inline void add(const AddArgs& a) {
  int64_t i = 0;
  for (; i + W <= a.n; i += W) store_bf16(a.sum + i, load_bf16(a.x + i) + load_bf16(a.y + i));
  for (; i < a.n; i++) a.sum[i] = to_bf16(from_bf16(a.x[i]) + from_bf16(a.y[i]));
}

inline void concat(const ConcatArgs& a) {
  for (int64_t r = 0; r < a.rows; r++) {
    uint16_t* to = a.out + r * (a.n + a.m);
    __builtin_memcpy(to, a.x + r * a.n, a.n * 2);
    __builtin_memcpy(to + a.n, a.y + r * a.m, a.m * 2);
  }
}

// Index of the largest of n values; the first of equal ones. A NaN counts as the largest, as in torch.topk.
inline int64_t largest_of(const float* values, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; i++)
    if (values[i] > values[best] || (values[i] != values[i] && values[best] == values[best])) best = i;
  return best;
}

inline void argmax(const ArgmaxArgs& a) {
  for (int64_t r = 0; r < a.rows; r++) {
    const uint16_t* x = a.logits + r * a.n;
    float largest = -__builtin_inff();
    int64_t best = 0, i = 0;
    auto consider = [&](int64_t j) {
      const float value = from_bf16(x[j]);
      if (largest == largest && !(value <= largest)) largest = value, best = j;
    };
    for (; i + W <= a.n; i += W)
      if (any(~(vi)(load_bf16(x + i) <= largest)))
        for (int64_t j = i; j < i + W; j++) consider(j);
    for (; i < a.n; i++) consider(i);
    a.ids[r] = best;
  }
}

inline void step_inputs(const StepArgs& a) {
  for (int64_t r = 0; r < a.requests; r++) {
    const int64_t slot = a.slots[r];
    check_range("the slot", slot, 0, a.count - 1);
    const int64_t start = a.starts[slot], *table = a.tables + slot * a.table_columns;
    check_range("the first position", start, 0, a.blocks * a.block_size - a.width);
    for (int64_t i = 0; i < a.width; i++) {
      const int64_t position = start + i, to = r * a.width + i;
      a.ids[to] = a.tokens[slot * a.width + i];
      a.positions[to] = position;
      a.mapping[to] = table[position / a.block_size] * a.block_size + position % a.block_size;
    }
    for (int64_t b = 0; b < a.blocks; b++) a.own[r * a.blocks + b] = table[b];
    a.contexts[r] = start + a.width;
  }
}

inline void route(const RouteArgs& a) {
  constexpr float NONE = -__builtin_inff();
  float* scores = static_cast<float*>(scratch(SCRATCH_ROUTING, (2 * a.experts + a.groups + 2 * W) * 4));
  float *choice = scores + a.experts + W, *group_scores = choice + a.experts + W;
  const int64_t size = a.experts / a.groups;
  for (int64_t t = 0; t < a.tokens; t++) {
    const float* logits = a.logits + t * a.experts;
    int64_t i = 0;
    for (; i + W <= a.experts; i += W) store(scores + i, 1.0f / (1.0f + exponential(-load(logits + i))));
    for (; i < a.experts; i++) scores[i] = 1.0f / (1.0f + exponential(splat(-logits[i]))[0]);
    for (i = 0; i < a.experts; i++) choice[i] = scores[i] + a.bias[i];
    if (a.groups > 1) {
      for (int64_t g = 0; g < a.groups; g++) {
        float first = NONE, second = NONE;
        for (i = g * size; i < (g + 1) * size; i++) {
          const float value = choice[i];
          if (value > first) second = first, first = value;
          else if (value > second) second = value;
        }
        group_scores[g] = first + second;
      }
      for (int64_t dropped = a.groups - a.kept_groups; dropped > 0; dropped--) {
        int64_t worst = -1;
        for (int64_t g = 0; g < a.groups; g++)  // the last of equal ones, so that the first ones stay
          if (group_scores[g] != NONE && (worst < 0 || group_scores[g] <= group_scores[worst])) worst = g;
        if (worst < 0) break;
        group_scores[worst] = NONE;
        for (i = worst * size; i < (worst + 1) * size; i++) choice[i] = NONE;
      }
    }
    float total = 0;
    for (int64_t k = 0; k < a.k; k++) {
      const int64_t best = largest_of(choice, a.experts);
      choice[best] = NONE;
      a.ids[t * a.k + k] = best;
      a.weights[t * a.k + k] = scores[best];
      total += scores[best];
    }
    const float divisor = a.normalize ? total + 1e-20f : 1.0f;
    for (int64_t k = 0; k < a.k; k++) a.weights[t * a.k + k] = a.weights[t * a.k + k] / divisor * a.scaling;
  }
}

inline void quantize(const QuantizeArgs& a) {
  parallel(useful_threads(a.threads, a.rows * a.n * 16, 0), a.rows, [&](int64_t r) {
    for (int64_t b = 0; b < a.n / 16; b++) {
      float block[16];
      int32_t codes[16];
      for (int i = 0; i < 16; i += W) store(block + i, load_bf16(a.x + r * a.x_stride + b * 16 + i));
      a.scale[r * (a.n / 16) + b] = quantize_block(block, a.input_scale, codes);
      for (int i = 0; i < 8; i++)
        a.packed[r * (a.n / 2) + b * 8 + i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    }
  });
}

// Sum of all 8-byte words, so that every byte is read.
inline uint64_t read(const uint8_t* data, int64_t bytes, int threads) {
  constexpr int64_t CHUNK = 1 << 18;
  uint64_t total = 0;
  parallel(threads, ceil_div(bytes, CHUNK), [&](int64_t item) {
    typedef uint64_t words __attribute__((vector_size(4 * W), aligned(8), may_alias));
    words sums[8] = {};
    const int64_t stop = (item + 1) * CHUNK < bytes ? (item + 1) * CHUNK : bytes;
    for (int64_t i = item * CHUNK; i + static_cast<int64_t>(sizeof(sums)) <= stop; i += sizeof(sums))
      for (int j = 0; j < 8; j++) {
        fetch(address(data) + i + 16384 + j * sizeof(words));
        sums[j] += *reinterpret_cast<const words*>(data + i + j * sizeof(words));
      }
    uint64_t own = 0;
    for (int j = 0; j < 8; j++)
      for (unsigned i = 0; i < sizeof(words) / 8; i++) own += sums[j][i];
    __atomic_fetch_add(&total, own, __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace
}  // namespace ISA
