// Python bindings. Tensors come as addresses: deepseek_fp4_plugin/kernels/cpu checks their shapes, dtypes and strides, the
// kernels check the numbers in them that lead to memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace nb = nanobind;

namespace {

bool has_avx512() {
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

// AVX2 and the 8-bit dot products of AVX-VNNI, which compilers have different names for.
bool has_avx2_vnni() {
#if defined(__x86_64__) && !defined(WITHOUT_AVX_VNNI)
  unsigned a = 0, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#else
  return false;
#endif
}

const Kernels* table(const std::string& path) {
#if defined(__x86_64__)
#if !defined(WITHOUT_AVX512)
  if (path == "avx512" && has_avx512()) return &avx512_kernels;
#endif
#if !defined(WITHOUT_AVX_VNNI)
  if (path == "avx2_vnni" && has_avx2_vnni()) return &avx2_vnni_kernels;
#endif
  if (path == "avx2" && has_avx2()) return &avx2_kernels;
#endif
  if (path == "portable") return &portable_kernels;
  throw std::invalid_argument("this processor has no kernel path '" + path + "'");
}

std::vector<std::string> paths() {
  std::vector<std::string> names;
  if (has_avx512()) names.push_back("avx512");
  if (has_avx2_vnni()) names.push_back("avx2_vnni");
  if (has_avx2()) names.push_back("avx2");
  names.push_back("portable");
  return names;
}

// Of the whole process, read once by every call: a thread that changes it meanwhile does not disturb one that runs.
std::atomic<const Kernels*> kernels{table(paths().front())};

std::string name_of(const Kernels* chosen) {
  for (const std::string& name : paths())
    if (table(name) == chosen) return name;
  return "";
}

std::string use_path(const std::string& path) { return name_of(kernels.exchange(table(path))); }

// Kernel calls in their order, to be made again without Python. It owns descriptions of weights, but no tensor's memory.
class Recording {
 public:
  void start() {
    if (current_recording) throw std::runtime_error("this thread records already");
    current_recording = this;
  }
  static void stop() { current_recording = nullptr; }
  void replay() const {
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }

  template <class Args>
  void add(void (*Kernels::*kernel)(const Args&), const Args& args) {
    calls_.push_back([kernel, args] { (kernels.load()->*kernel)(args); });
  }
  const Weight* keep(const Weight* weight) { return &weights_.emplace_back(*weight); }

  static thread_local Recording* current_recording;

 private:
  std::vector<std::function<void()>> calls_;
  std::deque<Weight> weights_;
};
thread_local Recording* Recording::current_recording = nullptr;

template <class Args>
void launch(void (*Kernels::*kernel)(const Args&), const Args& args) {
  (kernels.load()->*kernel)(args);
  if (Recording::current_recording) Recording::current_recording->add(kernel, args);
}

// The halves of gate_up's outputs, by half as many inputs of down; and the experts of both are the same ones.
void check_mlp(const Weight& gate_up, const Weight& down) {
  const bool halves = gate_up.parts == 2 ? gate_up.part[0].out == gate_up.part[1].out : gate_up.parts == 1;
  const bool whole_blocks = gate_up.parts == 2 || gate_up.format != FP8_BLOCK || down.in % gate_up.block_rows == 0;
  if (halves && whole_blocks && down.parts == 1 && gate_up.out == 2 * down.in && gate_up.experts == down.experts) return;
  throw std::invalid_argument(
      "gate and up [" + std::to_string(gate_up.out) + ", " + std::to_string(gate_up.in) + "] of " +
      std::to_string(gate_up.experts) + " experts do not fit down [" + std::to_string(down.out) + ", " +
      std::to_string(down.in) + "] of " + std::to_string(down.experts));
}

// A weight whose description outlives the call if it is recorded.
const Weight* kept(const Weight& weight) {
  return Recording::current_recording ? Recording::current_recording->keep(&weight) : &weight;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// parts: (values, scale, scale_2, out) with addresses, 0 for none.
Weight make_weight(
    int format, int64_t in, int64_t experts, int64_t block_rows, int64_t block_cols, int activations,
    float input_scale, const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>>& parts) {
  if (parts.empty() || parts.size() > MAX_PARTS) throw std::invalid_argument("a weight has 1 to 4 parts");
  Weight w{};
  w.format = static_cast<Format>(format);
  w.in = in;
  w.experts = experts;
  w.block_rows = block_rows;
  w.block_cols = block_cols;
  w.activations = static_cast<Activations>(activations);
  if (w.activations != AS_BF16 && w.format != NVFP4) throw std::invalid_argument("only NVFP4 weights round activations");
  w.input_scale = input_scale;
  for (const auto& [values, scale, scale_2, out] : parts) {
    w.part[w.parts++] = {at<const uint8_t>(values), at<const uint8_t>(scale), at<const float>(scale_2), out};
    w.out += out;
  }
  return w;
}

}  // namespace

void outside_vocabulary(int64_t id, int64_t vocab) {
  throw std::out_of_range("token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocab));
}

void out_of_range(const char* what, int64_t value, int64_t first, int64_t last) {
  throw std::out_of_range(
      std::string(what) + " is " + std::to_string(value) + "; only " + std::to_string(first) + " to " +
      std::to_string(last) + " can be");
}

NB_MODULE(_native, m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::set_leak_warnings(false);  // weights that live until the interpreter ends are no leak

  nb::class_<Weight>(m, "Weight");
  m.def("weight", make_weight);
  nb::class_<Recording>(m, "Recording", "Kernel calls between start() and stop() of a thread, for replay().")
      .def(nb::init<>())
      .def("start", &Recording::start)
      .def_static("stop", &Recording::stop)
      .def("replay", &Recording::replay, Unlocked())
      .def("__len__", &Recording::size);
  m.attr("INTERFACE") = 5;  // counts with kernels/cpu/extension.py's
  m.def("paths", paths, "Instruction-set paths this processor can run, fastest first.");
  m.def("path", [] { return name_of(kernels); }, "The path in use.");
  m.def("use_path", use_path, "Take another path; returns the one before. For tests and measurements.");

  m.def(
      "linear",
      [](const Weight& w, int64_t expert, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y, int threads) {
        check_range("the expert", expert, 0, w.experts - 1);
        launch(&Kernels::linear, LinearArgs{kept(w), expert, at<const uint16_t>(x), x_stride, rows, at<uint16_t>(y), threads});
      },
      Unlocked());
  m.def(
      "experts",
      [](const Weight& gate_up, const Weight& down, uintptr_t x, uintptr_t ids, uintptr_t weights, int64_t tokens,
         int64_t k, uintptr_t y, int threads) {
        check_mlp(gate_up, down);
        launch(&Kernels::experts,
               ExpertsArgs{kept(gate_up), kept(down), at<const uint16_t>(x), at<const int64_t>(ids),
                           at<const float>(weights), tokens, k, at<uint16_t>(y), threads});
      },
      Unlocked());
  m.def(
      "attention",
      [](uintptr_t q_latent, std::tuple<int64_t, int64_t> latent_strides, uintptr_t q_rope,
         std::tuple<int64_t, int64_t> rope_strides, std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t cache,
         bool fp8, int64_t blocks, int64_t block_size, uintptr_t block_tables, int64_t table_stride,
         int64_t table_columns, int64_t tokens, int64_t requests, uintptr_t query_start, uintptr_t context_lens, float scale, uintptr_t output, int threads) {
        AttentionArgs a{};
        a.q_latent = at<const uint16_t>(q_latent);
        a.q_rope = at<const uint16_t>(q_rope);
        std::tie(a.latent_strides[0], a.latent_strides[1]) = latent_strides;
        std::tie(a.rope_strides[0], a.rope_strides[1]) = rope_strides;
        std::tie(a.heads, a.latent, a.rope) = sizes;
        a.cache = at<const uint8_t>(cache);
        a.fp8 = fp8;
        a.blocks = blocks;
        a.block_size = block_size;
        a.block_tables = at<const int64_t>(block_tables);
        a.table_stride = table_stride;
        a.table_columns = table_columns;
        a.tokens = tokens;
        a.requests = requests;
        a.query_start = at<const int64_t>(query_start);
        a.context_lens = at<const int64_t>(context_lens);
        a.scale = scale;
        a.output = at<uint16_t>(output);
        a.threads = threads;
        launch(&Kernels::attention, a);
      },
      Unlocked());
  m.def(
      "norm",
      [](uintptr_t x, int64_t x_stride, int64_t rows, int64_t n, uintptr_t weight, float eps, uintptr_t y,
         int threads) {
        launch(&Kernels::norm, NormArgs{at<const uint16_t>(x), x_stride, rows, n, at<const uint16_t>(weight), eps,
                                        at<uint16_t>(y), threads});
      },
      Unlocked());
  m.def(
      "rotary",
      [](uintptr_t x, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads, int64_t d, uintptr_t cos,
         uintptr_t sin, uintptr_t y) {
        launch(&Kernels::rotary, RotaryArgs{at<const uint16_t>(x), token_stride, head_stride, tokens, heads, d,
                                            at<const float>(cos), at<const float>(sin), at<uint16_t>(y)});
      },
      Unlocked());
  m.def(
      "route",
      [](uintptr_t logits, uintptr_t bias, int64_t tokens, int64_t experts, int64_t k, int64_t groups,
         int64_t kept_groups, bool normalize, float scaling, uintptr_t ids, uintptr_t weights) {
        launch(&Kernels::route, RouteArgs{at<const float>(logits), at<const float>(bias), tokens, experts, k, groups,
                                          kept_groups, normalize, scaling, at<int64_t>(ids), at<float>(weights)});
      },
      Unlocked());
  m.def(
      "quantize",
      [](uintptr_t x, int64_t x_stride, int64_t rows, int64_t n, float input_scale, uintptr_t packed, uintptr_t scale,
         int threads) {
        launch(&Kernels::quantize, QuantizeArgs{at<const uint16_t>(x), x_stride, rows, n, input_scale,
                                                at<uint8_t>(packed), at<uint8_t>(scale), threads});
      },
      Unlocked());
  using HeadKernel = void (*Kernels::*)(const HeadArgs&);
  auto head_product = [&m](const char* name, HeadKernel kernel) {
    m.def(
        name,
        [kernel](const Weight& w, uintptr_t x, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads,
                 int64_t first, int64_t rows, uintptr_t y, int threads) {
          if (w.parts != 1 || w.experts != 1) throw std::invalid_argument("per-head products take a weight of one part");
          launch(kernel, HeadArgs{kept(w), at<const uint16_t>(x), token_stride, head_stride, tokens, heads, first, rows,
                                  at<uint16_t>(y), threads});
        },
        Unlocked());
  };
  head_product("absorb", &Kernels::absorb);
  head_product("per_head", &Kernels::per_head);
  m.def(
      "embedding",
      [](uintptr_t ids, int64_t tokens, uintptr_t weight, int64_t vocab, int64_t n, uintptr_t y) {
        launch(&Kernels::embedding,
               EmbeddingArgs{at<const int64_t>(ids), tokens, at<const uint16_t>(weight), vocab, n, at<uint16_t>(y)});
      },
      Unlocked());
  m.def(
      "angles",
      [](uintptr_t positions, int64_t tokens, uintptr_t frequencies, int64_t n, float magnitude, uintptr_t cos,
         uintptr_t sin) {
        launch(&Kernels::angles, AnglesArgs{at<const int64_t>(positions), tokens, at<const float>(frequencies), n,
                                            magnitude, at<float>(cos), at<float>(sin)});
      },
      Unlocked());
  m.def(
      "argmax",
      [](uintptr_t logits, int64_t rows, int64_t n, uintptr_t ids) {
        launch(&Kernels::argmax, ArgmaxArgs{at<const uint16_t>(logits), rows, n, at<int64_t>(ids)});
      },
      Unlocked());
  m.def(
      "step_inputs",
      [](std::tuple<uintptr_t, int64_t, int64_t> slots, uintptr_t starts, std::tuple<uintptr_t, int64_t> tokens,
         std::tuple<uintptr_t, int64_t> tables, int64_t blocks, int64_t block_size,
         std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t> outputs) {
        const auto [ids, positions, mapping, own, contexts] = outputs;
        launch(&Kernels::step_inputs,
               StepArgs{at<const int64_t>(std::get<0>(slots)), std::get<1>(slots), std::get<2>(slots),
                        at<const int64_t>(starts), at<const int64_t>(std::get<0>(tokens)), std::get<1>(tokens),
                        at<const int64_t>(std::get<0>(tables)), std::get<1>(tables), blocks, block_size,
                        at<int64_t>(ids), at<int64_t>(positions), at<int64_t>(mapping), at<int64_t>(own),
                        at<int64_t>(contexts)});
      },
      Unlocked());
  m.def(
      "add",
      [](uintptr_t x, uintptr_t y, int64_t n, uintptr_t sum) {
        launch(&Kernels::add, AddArgs{at<const uint16_t>(x), at<const uint16_t>(y), n, at<uint16_t>(sum)});
      },
      Unlocked());
  m.def(
      "concat",
      [](uintptr_t x, int64_t n, uintptr_t y, int64_t m, int64_t rows, uintptr_t out) {
        launch(&Kernels::concat,
               ConcatArgs{at<const uint16_t>(x), n, at<const uint16_t>(y), m, rows, at<uint16_t>(out)});
      },
      Unlocked());
  m.def(
      "latent_entries",
      [](uintptr_t x, int64_t x_stride, int64_t tokens, int64_t latent, int64_t rope, uintptr_t weight, float eps,
         uintptr_t cos, uintptr_t sin, uintptr_t y) {
        launch(&Kernels::latent_entries,
               EntryArgs{at<const uint16_t>(x), x_stride, tokens, latent, rope, at<const uint16_t>(weight), eps,
                         at<const float>(cos), at<const float>(sin), at<uint16_t>(y)});
      },
      Unlocked());
  m.def(
      "store_entries",
      [](uintptr_t entries, int64_t tokens, int64_t width, uintptr_t slots, int64_t slot_count, uintptr_t cache,
         bool fp8) {
        launch(&Kernels::store_entries, StoreArgs{at<const uint16_t>(entries), tokens, width, at<const int64_t>(slots),
                                                  slot_count, at<uint8_t>(cache), fp8});
      },
      Unlocked());
  m.def(
      "linear_fp32",
      [](uintptr_t x, int64_t x_stride, int64_t rows, int64_t in, int64_t out, uintptr_t weight, uintptr_t y,
         int threads) {
        launch(&Kernels::linear_fp32, Fp32Args{at<const uint16_t>(x), x_stride, rows, in, out, at<const float>(weight),
                                               at<float>(y), threads});
      },
      Unlocked());
  const auto source_weight = [](uintptr_t values, uintptr_t scale_inv, int64_t rows, int64_t n, int64_t block_rows,
                                int64_t block_cols) {
    if (n % 16 || (scale_inv && (block_cols % 16 || block_rows < 1)))
      throw std::invalid_argument("a weight and its blocks are multiples of 16 wide");
    return SourceWeight{at<const uint8_t>(values), at<const float>(scale_inv), rows, n, block_rows, block_cols};
  };
  m.def(
      "weight_amax",
      [source_weight](uintptr_t values, uintptr_t scale_inv, int64_t rows, int64_t n, int64_t block_rows,
                      int64_t block_cols, uintptr_t amax, int threads) {
        kernels.load()->weight_amax(
            {source_weight(values, scale_inv, rows, n, block_rows, block_cols), at<float>(amax), threads});
      },
      Unlocked());
  m.def(
      "convert",
      [source_weight](uintptr_t values, uintptr_t scale_inv, int64_t rows, int64_t n, int64_t block_rows,
                      int64_t block_cols, float scale_2, uintptr_t packed, uintptr_t scale, uintptr_t energies,
                      int threads) {
        kernels.load()->convert({source_weight(values, scale_inv, rows, n, block_rows, block_cols), scale_2,
                                 at<uint8_t>(packed), at<uint8_t>(scale), at<double>(energies), threads});
      },
      Unlocked());
  m.def(
      "read",
      [](uintptr_t data, int64_t bytes, int threads) { return kernels.load()->read(at<const uint8_t>(data), bytes, threads); },
      Unlocked(), "Reads every byte and returns a sum of them: the machine's read bandwidth.");
}
