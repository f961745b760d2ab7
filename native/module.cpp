// Python bindings. Tensors come as addresses: their owners in deepseek_fp4_plugin/kernels/cpu check shapes and dtypes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace {

bool has_avx512() {
#if defined(__x86_64__)
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

const Kernels* table(const std::string& path) {
#if defined(__x86_64__)
  if (path == "avx512" && has_avx512()) return &avx512_kernels;
  if (path == "avx2" && has_avx2()) return &avx2_kernels;
#endif
  if (path == "portable") return &portable_kernels;
  throw std::invalid_argument("this processor has no kernel path '" + path + "'");
}

std::vector<std::string> paths() {
  std::vector<std::string> names;
  if (has_avx512()) names.push_back("avx512");
  if (has_avx2()) names.push_back("avx2");
  names.push_back("portable");
  return names;
}

std::string current = paths().front();
const Kernels* kernels = table(current);

std::string use_path(const std::string& path) {
  const Kernels* chosen = table(path);
  std::string before = current;
  current = path;
  kernels = chosen;
  return before;
}

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
    calls_.push_back([kernel, args] { (kernels->*kernel)(args); });
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
  if (Recording::current_recording) Recording::current_recording->add(kernel, args);
  (kernels->*kernel)(args);
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
    int format, int64_t in, int64_t experts, int64_t block_rows, int64_t block_cols, float input_scale,
    const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>>& parts) {
  if (parts.empty() || parts.size() > MAX_PARTS) throw std::invalid_argument("a weight has 1 to 4 parts");
  Weight w{};
  w.format = static_cast<Format>(format);
  w.in = in;
  w.experts = experts;
  w.block_rows = block_rows;
  w.block_cols = block_cols;
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
  m.def("paths", paths, "Instruction-set paths this processor can run, fastest first.");
  m.def("path", [] { return current; }, "The path in use.");
  m.def("use_path", use_path, "Take another path; returns the one before. For tests and measurements.");

  m.def(
      "linear",
      [](const Weight& w, int64_t expert, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y, int threads) {
        launch(&Kernels::linear, LinearArgs{kept(w), expert, at<const uint16_t>(x), x_stride, rows, at<uint16_t>(y), threads});
      },
      Unlocked());
  m.def(
      "experts",
      [](const Weight& gate_up, const Weight& down, uintptr_t x, uintptr_t ids, uintptr_t weights, int64_t tokens,
         int64_t k, uintptr_t y, int threads) {
        launch(&Kernels::experts,
               ExpertsArgs{kept(gate_up), kept(down), at<const uint16_t>(x), at<const int64_t>(ids),
                           at<const float>(weights), tokens, k, at<uint16_t>(y), threads});
      },
      Unlocked());
  m.def(
      "attention",
      [](uintptr_t q_latent, std::tuple<int64_t, int64_t> latent_strides, uintptr_t q_rope,
         std::tuple<int64_t, int64_t> rope_strides, std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t cache,
         bool fp8, int64_t block_size, uintptr_t block_tables, int64_t table_stride, int64_t requests,
         uintptr_t query_start, uintptr_t context_lens, float scale, uintptr_t output, int threads) {
        AttentionArgs a{};
        a.q_latent = at<const uint16_t>(q_latent);
        a.q_rope = at<const uint16_t>(q_rope);
        std::tie(a.latent_strides[0], a.latent_strides[1]) = latent_strides;
        std::tie(a.rope_strides[0], a.rope_strides[1]) = rope_strides;
        std::tie(a.heads, a.latent, a.rope) = sizes;
        a.cache = at<const uint8_t>(cache);
        a.fp8 = fp8;
        a.block_size = block_size;
        a.block_tables = at<const int64_t>(block_tables);
        a.table_stride = table_stride;
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
      [](uintptr_t entries, int64_t tokens, int64_t width, uintptr_t slots, uintptr_t cache, bool fp8) {
        launch(&Kernels::store_entries, StoreArgs{at<const uint16_t>(entries), tokens, width, at<const int64_t>(slots),
                                                  at<uint8_t>(cache), fp8});
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
  m.def(
      "read",
      [](uintptr_t data, int64_t bytes, int threads) { return kernels->read(at<const uint8_t>(data), bytes, threads); },
      Unlocked(), "Reads every byte and returns a sum of them: the machine's read bandwidth.");
}
