// What the bindings and the instruction sets' translation units share: plain data and tables of functions.
//
// Those units are compiled with different -m flags, so they must not instantiate anything that another unit could be
// linked against: no standard library templates in them, and all of their own code in a namespace of their own.
#pragma once
#include <cstdint>

enum Format : int { PLAIN = 0, FP8_BLOCK = 1, NVFP4 = 2 };
enum Activations : int { AS_BF16 = 0, AS_FP4 = 1, AS_INT8 = 2 };  // what activations are rounded to
constexpr int MAX_PARTS = 4;

// One projection, [experts, out, in]. values: BF16, E4M3 or packed E2M1. scale: FP8_BLOCK FP32 [experts, row blocks,
// column blocks]; NVFP4 E4M3 [experts, out, in / 16]. scale_2: NVFP4 FP32 [experts].
struct Part {
  const uint8_t* values;
  const uint8_t* scale;
  const float* scale_2;
  int64_t out;
};

// Projections with one input whose outputs follow each other. activations: other than BF16 for NVFP4 only.  input_scale:
// of FP4 ones.
struct Weight {
  Format format;
  int64_t in, out, experts;
  int64_t block_rows, block_cols;  // FP8_BLOCK
  Activations activations;
  float input_scale;
  int parts;
  Part part[MAX_PARTS];
};

// x: BF16 [rows, in], row r at x + r * x_stride elements.  y: BF16 [rows, out], dense.  expert: of a stack, else 0.
struct LinearArgs {
  const Weight* weight;
  int64_t expert;
  const uint16_t* x;
  int64_t x_stride, rows;
  uint16_t* y;
  int threads;
};

// y[t] = sum over k of weights[t, k] * down(silu(gate x) * up x). x, y: BF16 [tokens, hidden].  ids: int64 [tokens, k],
// -1 for none; null: all to expert 0.  weights: FP32 [tokens, k]; null: 1.  gate_up: the first half of its outputs is gate.
struct ExpertsArgs {
  const Weight *gate_up, *down;
  const uint16_t* x;
  const int64_t* ids;
  const float* weights;
  int64_t tokens, k;
  uint16_t* y;
  int threads;
};

// See kernels/reference/attention.py. q_latent, q_rope: BF16 [T, heads, .] with the given strides in elements.
struct AttentionArgs {
  const uint16_t *q_latent, *q_rope;
  int64_t latent_strides[2], rope_strides[2];
  int64_t heads, latent, rope;
  const uint8_t* cache;
  bool fp8;
  int64_t blocks, block_size;
  const int64_t* block_tables;
  int64_t table_stride, table_columns, tokens, requests;
  const int64_t *query_start, *context_lens;
  float scale;
  uint16_t* output;
  int threads;
};

// x: [rows, n], y: dense [rows, n], BF16.
struct NormArgs {
  const uint16_t* x;
  int64_t x_stride, rows, n;
  const uint16_t* weight;
  float eps;
  uint16_t* y;
  int threads;
};

// x: BF16 [tokens, heads, d] with strides in elements; cos, sin: FP32 [tokens, d / 2] dense; y: dense.
struct RotaryArgs {
  const uint16_t* x;
  int64_t token_stride, head_stride, tokens, heads, d;
  const float *cos, *sin;
  uint16_t* y;
};

// See kernels/reference/routing.py. logits: FP32 [tokens, experts].
struct RouteArgs {
  const float *logits, *bias;
  int64_t tokens, experts, k, groups, kept_groups;
  bool normalize;
  float scaling;
  int64_t* ids;
  float* weights;
};

// See numerics/nvfp4.py, quantize_activation. packed: uint8 [rows, n / 2], scale: E4M3 [rows, n / 16].
struct QuantizeArgs {
  const uint16_t* x;
  int64_t x_stride, rows, n;
  float input_scale;
  uint8_t *packed, *scale;
  int threads;
};

// Products by each head's own rows of one weight [heads * (out / heads), in], of which a head takes `rows` from `first`
// on. x: BF16 [tokens, heads, .] with strides in elements.  y: BF16 [tokens, heads, .], dense.
//   per_head  y = x W^T: x [.., in] to y [.., rows]
//   absorb    y = x W:   x [.., rows] to y [.., in]
struct HeadArgs {
  const Weight* weight;
  const uint16_t* x;
  int64_t token_stride, head_stride, tokens, heads, first, rows;
  uint16_t* y;
  int threads;
};

// y[t] = weight[ids[t]]: BF16 [tokens, n]; weight [vocab, n].
struct EmbeddingArgs {
  const int64_t* ids;
  int64_t tokens;
  const uint16_t* weight;
  int64_t vocab, n;
  uint16_t* y;
};

// FP32 [tokens, n]: cosine and sine of positions[t] * frequencies[i], times magnitude.
struct AnglesArgs {
  const int64_t* positions;
  int64_t tokens;
  const float* frequencies;
  int64_t n;
  float magnitude;
  float *cos, *sin;
};

// ids[t]: index of the largest of logits[t, :], BF16 [rows, n]; the first of equal ones; a NaN is the largest.
struct ArgmaxArgs {
  const uint16_t* logits;
  int64_t rows, n;
  int64_t* ids;
};

// See kernels/ops.py. slots: [requests], each below `count`.  starts: [count].  tokens: [count, width].  tables: [count,
// table_columns].  ids, positions, mapping: [requests, width].  own: [requests, blocks].  contexts: [requests].
struct StepArgs {
  const int64_t* slots;
  int64_t requests, count;
  const int64_t *starts, *tokens;
  int64_t width;
  const int64_t* tables;
  int64_t table_columns, blocks, block_size;
  int64_t *ids, *positions, *mapping, *own, *contexts;
};

// sum = x + y, BF16 [n].
struct AddArgs {
  const uint16_t *x, *y;
  int64_t n;
  uint16_t* sum;
};

// Rows of x, BF16 [rows, n], each followed by its row of y [rows, m].
struct ConcatArgs {
  const uint16_t* x;
  int64_t n;
  const uint16_t* y;
  int64_t m, rows;
  uint16_t* out;
};

// x: BF16 [tokens, latent + rope].  weight: the latents' norm.  cos, sin: FP32 [tokens, rope / 2].  y: like x, dense.
struct EntryArgs {
  const uint16_t* x;
  int64_t x_stride, tokens, latent, rope;
  const uint16_t* weight;
  float eps;
  const float *cos, *sin;
  uint16_t* y;
};

// entries: BF16 [tokens, width].  cache: BF16 or E4M3 [slots, width].
struct StoreArgs {
  const uint16_t* entries;
  int64_t tokens, width;
  const int64_t* slots;
  int64_t slot_count;
  uint8_t* cache;
  bool fp8;
};

// x: BF16 [rows, in].  weight: FP32 [out, in].  y: FP32 [rows, out].
struct Fp32Args {
  const uint16_t* x;
  int64_t x_stride, rows, in, out;
  const float* weight;
  float* y;
  int threads;
};

// What a tensor's values lead to is checked at every call, also at a recording's, before anything is written. These throw;
// they are defined outside of the units.
[[noreturn]] void outside_vocabulary(int64_t id, int64_t vocab);
[[noreturn]] void out_of_range(const char* what, int64_t value, int64_t first, int64_t last);
inline void check_range(const char* what, int64_t value, int64_t first, int64_t last) {
  if (value < first || value > last) out_of_range(what, value, first, last);
}

// A source's weight: E4M3 [rows, n] with scale_inv FP32, one a block of block_rows x block_cols (a multiple of 16); or
// BF16, scale_inv null. n is a multiple of 16.
struct SourceWeight {
  const uint8_t* values;
  const float* scale_inv;
  int64_t rows, n, block_rows, block_cols;
};

// amax: FP32 [rows], the largest magnitude of each row in BF16; NaN where one is not finite.
struct WeightAmaxArgs {
  SourceWeight weight;
  float* amax;
  int threads;
};

// packed: uint8 [rows, n / 2].  scale: E4M3 [rows, n / 16].  energies: FP64 [rows, 2], of the weight and of the error.
struct ConvertArgs {
  SourceWeight weight;
  float scale_2;
  uint8_t *packed, *scale;
  double* energies;
  int threads;
};

struct Kernels {
  void (*linear)(const LinearArgs&);
  void (*experts)(const ExpertsArgs&);
  void (*attention)(const AttentionArgs&);
  void (*norm)(const NormArgs&);
  void (*rotary)(const RotaryArgs&);
  void (*route)(const RouteArgs&);
  void (*quantize)(const QuantizeArgs&);
  void (*absorb)(const HeadArgs&);
  void (*per_head)(const HeadArgs&);
  void (*latent_entries)(const EntryArgs&);
  void (*store_entries)(const StoreArgs&);
  void (*linear_fp32)(const Fp32Args&);
  void (*embedding)(const EmbeddingArgs&);
  void (*angles)(const AnglesArgs&);
  void (*argmax)(const ArgmaxArgs&);
  void (*step_inputs)(const StepArgs&);
  void (*add)(const AddArgs&);
  void (*concat)(const ConcatArgs&);
  void (*weight_amax)(const WeightAmaxArgs&);
  void (*convert)(const ConvertArgs&);
  uint64_t (*read)(const uint8_t* data, int64_t bytes, int threads);  // reads every byte: the memory roof
};

extern const Kernels avx512_kernels, avx2_vnni_kernels, avx2_kernels, portable_kernels;
