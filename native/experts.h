// The routed experts' gated MLP, without a pass through memory for every expert and operation.
//
// Rounding points are those of kernels/reference/moe.py: gate, up, silu(gate), hidden and each expert's output are BF16,
// the sum over experts is FP32, in order of expert number.
#pragma once
#include "linear.h"

namespace ISA {
namespace {

// Rows sorted by expert: slots of expert e are order[start[e]] .. order[start[e + 1]].
struct Routing {
  int32_t *order, *start, *token, *active;
  int64_t slots, active_count, most;
};

inline Routing sort_by_expert(const ExpertsArgs& a, int64_t experts) {
  const int64_t n = a.tokens * a.k;
  int32_t* memory = static_cast<int32_t*>(scratch(SCRATCH_ROUTING, (2 * n + 3 * experts + 2) * 4));
  Routing r{memory, memory + n, memory + n + experts + 1, memory + 2 * n + experts + 1, 0, 0, 0};
  int32_t* next = r.active + experts;
  for (int64_t e = 0; e <= experts; e++) r.start[e] = 0;
  auto expert_of = [&](int64_t i) { return a.ids ? a.ids[i] : 0; };
  for (int64_t i = 0; i < n; i++) {
    check_range("an expert id", expert_of(i), -1, experts - 1);
    if (expert_of(i) >= 0) r.start[expert_of(i) + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) {
    if (r.start[e + 1] > 0) r.active[r.active_count++] = static_cast<int32_t>(e);
    if (r.start[e + 1] > r.most) r.most = r.start[e + 1];
    r.start[e + 1] += r.start[e];
    next[e] = r.start[e];
  }
  for (int64_t i = 0; i < n; i++) {
    if (expert_of(i) < 0) continue;
    int32_t at = next[expert_of(i)]++;
    r.order[at] = static_cast<int32_t>(i);
    r.token[at] = static_cast<int32_t>(i / a.k);
  }
  r.slots = r.start[experts];
  return r;
}

inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// hidden = round(silu(gate)) * up, all BF16. gate and up are FP32 results still to be rounded.
inline void gated(const float* gate, const float* up, int64_t n, uint16_t* hidden) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    store_bf16(hidden + i, round_bf16(silu(round_bf16(load(gate + i)))) * round_bf16(load(up + i)));
  if (i < n) {
    float g[W] = {}, u[W] = {};
    uint16_t h[W];
    for (int64_t j = i; j < n; j++) g[j - i] = gate[j], u[j - i] = up[j];
    store_bf16(h, round_bf16(silu(round_bf16(load(g)))) * round_bf16(load(u)));
    for (int64_t j = i; j < n; j++) hidden[j] = h[j - i];
  }
}

// Both layouts that a batch's experts may need, each only if one does.
struct ExpertInputs {
  Rows few, many;
};
inline ExpertInputs prepare_expert_inputs(
    const uint16_t* x, int64_t count, const Weight& weight, const Routing& routing, ScratchSlot slot, int threads) {
  const Layout few = dot_layout(weight), many = layout_for(weight, routing.most);
  bool any_few = few == many;
  for (int64_t i = 0; i < routing.active_count && !any_few; i++) {
    int32_t e = routing.active[i];
    any_few = are_few(routing.start[e + 1] - routing.start[e]);
  }
  const int64_t few_bytes = any_few ? rows_bytes(few, weight.in, count) : 0;
  const int64_t many_bytes = few == many ? 0 : rows_bytes(many, weight.in, count);
  uint8_t* memory = static_cast<uint8_t*>(scratch(slot, few_bytes + many_bytes));
  ExpertInputs inputs{};
  if (few_bytes) inputs.few = prepare_rows(x, weight.in, count, weight, few, memory, threads);
  inputs.many = few == many ? inputs.few : prepare_rows(x, weight.in, count, weight, many, memory + few_bytes, threads);
  return inputs;
}

inline View gate_view(const Weight& gate_up, int64_t expert) { return view_of(gate_up, 0, expert); }

inline View up_view(const Weight& gate_up, int64_t expert, int64_t inner) {
  if (gate_up.parts == 2) return view_of(gate_up, 1, expert);
  View u = view_of(gate_up, 0, expert);  // one projection whose rows are gate's, then up's
  u.values += inner * u.row_bytes;
  if (u.format == NVFP4) u.scale += inner * u.scale_cols;
  if (u.format == FP8_BLOCK) u.scale += inner / u.block_rows * u.scale_cols * 4;
  return u;
}

inline void experts(const ExpertsArgs& a) {
  const Weight &gate_up = *a.gate_up, &down = *a.down;
  const int64_t inner = down.in, hidden = down.out;
  const Routing routing = sort_by_expert(a, gate_up.experts);
  const int64_t outputs = gate_up.out * routing.active_count;
  const int threads = useful_threads(a.threads, outputs * row_bytes(gate_up), routing.slots * gate_up.out * gate_up.in);
  const ExpertInputs x = prepare_expert_inputs(a.x, a.tokens, gate_up, routing, SCRATCH_INPUT, threads);
  uint16_t* h = static_cast<uint16_t*>(scratch(SCRATCH_RESULT, routing.slots * inner * 2 + 64));
  const bool mostly_few = are_few(routing.most);

  const int64_t widest = mostly_few ? WIDE : STRIDE;  // many rows' sums should stay in cache
  const int64_t width = tile_width(inner * routing.active_count, mostly_few, threads, widest);
  const int64_t stride = width < STRIDE ? STRIDE : width;
  const int64_t tiles = ceil_div(inner, width);
  parallel(threads, routing.active_count * tiles, [&](int64_t item) {
    const int32_t e = routing.active[item / tiles];
    const int64_t first = item % tiles * width, last = first + width < inner ? first + width : inner;
    const int64_t begin = routing.start[e], count = routing.start[e + 1] - begin;
    const bool few = are_few(count);
    Rows rows = few ? x.few : x.many;
    rows.index = routing.token + begin;
    rows.count = count;
    float* gate = static_cast<float*>(scratch(SCRATCH_TILE, 2 * count * stride * 4));
    float* up = gate + count * stride;
    View g = gate_view(gate_up, e), u = up_view(gate_up, e, inner);
    set_next(g, last, u, first);
    const int64_t next = item + 1 < routing.active_count * tiles ? item + 1 : item;
    set_next(u, last, gate_view(gate_up, routing.active[next / tiles]), next % tiles * width);
    tile(g, first, last, rows, few, gate, stride);
    tile(u, first, last, rows, few, up, stride);
    for (int64_t r = 0; r < count; r++)
      gated(gate + r * stride, up + r * stride, last - first, h + (begin + r) * inner + first);
  });

  const ExpertInputs mid = prepare_expert_inputs(h, routing.slots, down, routing, SCRATCH_HIDDEN, threads);
  const int64_t out_width = tile_width(hidden, mostly_few, threads, widest);
  const int64_t out_stride = out_width < STRIDE ? STRIDE : out_width;
  parallel(threads, ceil_div(hidden, out_width), [&](int64_t item) {
    const int64_t first = item * out_width, last = first + out_width < hidden ? first + out_width : hidden;
    float* result = static_cast<float*>(scratch(SCRATCH_TILE, (routing.most + a.tokens) * out_stride * 4));
    float* total = result + routing.most * out_stride;
    __builtin_memset(total, 0, a.tokens * out_stride * 4);
    for (int64_t i = 0; i < routing.active_count; i++) {
      const int32_t e = routing.active[i];
      const int64_t begin = routing.start[e], count = routing.start[e + 1] - begin;
      const bool few = are_few(count);
      Rows rows = few ? mid.few : mid.many;
      rows.base += begin * rows.row_bytes;
      rows.count = count;
      View v = view_of(down, 0, e);
      const bool more = i + 1 < routing.active_count;
      set_next(v, last, view_of(down, 0, routing.active[more ? i + 1 : 0]), more ? first : last);
      tile(v, first, last, rows, few, result, out_stride);
      for (int64_t r = 0; r < count; r++) {
        const vf weight = splat(a.weights ? a.weights[routing.order[begin + r]] : 1.0f);
        float* to = total + routing.token[begin + r] * out_stride;
        // Whole vectors: what lies in a tile beyond `last` is never stored.
        for (int64_t o = 0; o < last - first; o += W)
          store(to + o, load(to + o) + round_bf16(load(result + r * out_stride + o)) * weight);
      }
    }
    for (int64_t t = 0; t < a.tokens; t++)
      for (int64_t o = 0; o < last - first; o++) a.y[t * hidden + first + o] = to_bf16(total[t * out_stride + o]);
  });
}

}  // namespace
}  // namespace ISA
