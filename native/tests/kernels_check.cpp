// The kernels of the units that this program is linked with, without Python: products of every weight format and number of
// rows, experts, attention and the small operations, against double sums over weights decoded here. For processors that
// can only be emulated. Prints one line a path and ends with 0 where every result is within two BF16 steps.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"

void outside_vocabulary(int64_t id, int64_t) { throw std::out_of_range("token id " + std::to_string(id)); }
void out_of_range(const char* what, int64_t, int64_t, int64_t) { throw std::out_of_range(what); }

namespace {

using Floats = std::vector<double>;
using Halves = std::vector<uint16_t>;
std::mt19937 source(1);

double bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
uint16_t to_bf16(double x) {
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double rounded(double x) { return bf16(to_bf16(x)); }
double e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 128 ? -value : value;
}
double e2m1(int code) {
  const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -values[code & 7] : values[code & 7];
}

Halves random_halves(int64_t n) {
  std::normal_distribution<double> normal;
  Halves x(n);
  for (auto& value : x) value = to_bf16(normal(source));
  return x;
}
Floats values_of(const Halves& x) {
  Floats values;
  for (uint16_t bits : x) values.push_back(bf16(bits));
  return values;
}

// Values of rows whose length is a multiple of 16, as integers of 8 bits with a scale each 16.
Floats in_integers(const Halves& x) {
  Floats values(x.size());
  for (size_t block = 0; block < x.size(); block += 16) {
    float amax = 0;
    for (size_t i = block; i < block + 16; i++) amax = std::fmax(amax, std::fabs(static_cast<float>(bf16(x[i]))));
    const float inverse = 127.0f / amax, scale = amax / 127.0f;
    for (size_t i = block; i < block + 16; i++)
      values[i] = static_cast<double>(std::nearbyint(static_cast<float>(bf16(x[i])) * inverse)) * static_cast<double>(scale);
  }
  return values;
}

// One projection of random bits, and what they mean.
struct Projection {
  std::vector<uint8_t> values, scale;
  std::vector<float> scale_2;
  Floats meaning;  // [experts, out, in]
  Weight weight{};

  Projection(Format format, int64_t out, int64_t in, int64_t experts = 1) {
    const int64_t n = experts * out * in;
    auto byte = [] { return static_cast<uint8_t>(source()); };
    meaning.resize(n);
    scale_2.assign(experts, 0.02f);
    if (format == PLAIN) {
      const Halves x = random_halves(n);
      values.resize(2 * n);
      std::memcpy(values.data(), x.data(), 2 * n);
      meaning = values_of(x);
    } else if (format == FP8_BLOCK) {
      const int64_t across = (in + 127) / 128, blocks = experts * ((out + 127) / 128) * across;
      std::vector<float> scales(blocks);
      for (float& s : scales) s = 0.5f + byte() / 256.0f;
      scale.resize(4 * blocks);
      std::memcpy(scale.data(), scales.data(), 4 * blocks);
      for (int64_t i = 0; i < n; i++) {
        uint8_t code = byte();
        if ((code & 127) == 127) code = 0;
        values.push_back(code);
        const int64_t row = i / in % out, expert = i / in / out;
        meaning[i] = e4m3(code) * scales[(expert * ((out + 127) / 128) + row / 128) * across + i % in / 128];
      }
    } else {
      for (int64_t i = 0; i < n / 16; i++) scale.push_back(byte() % 127);
      for (int64_t i = 0; i < n / 2; i++) values.push_back(byte());
      for (int64_t i = 0; i < n; i++)
        meaning[i] = e2m1(values[i / 2] >> (i % 2 * 4) & 15) * e4m3(scale[i / 16]) * static_cast<double>(scale_2[0]);
    }
    weight.format = format;
    weight.in = in;
    weight.out = out;
    weight.experts = experts;
    weight.block_rows = weight.block_cols = 128;
    weight.parts = 1;
    weight.part[0] = {values.data(), scale.empty() ? nullptr : scale.data(), scale_2.data(), out};
  }
};

void compare(const std::string& what, const Halves& actual, const Floats& expected, double steps = 2) {
  double largest = 1e-37, worst = 0;
  for (double value : expected) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); i++) {
    const double difference = std::fabs(bf16(actual[i]) - expected[i]);
    if (!(difference <= worst)) worst = difference;  // a NaN stays
  }
  if (actual.size() == expected.size() && worst <= steps / 256 * largest) return;
  std::fprintf(stderr, "%s: off by %g of %g\n", what.c_str(), worst, largest);
  std::exit(1);
}

// x [rows, in] times w [out, in].
Floats product(const Floats& x, const double* w, int64_t rows, int64_t in, int64_t out) {
  Floats y(rows * out);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t o = 0; o < out; o++)
      for (int64_t k = 0; k < in; k++) y[r * out + o] += x[r * in + k] * w[o * in + k];
  return y;
}

void check_products(const Kernels& kernels) {
  const struct {
    const char* name;
    Format format;
    Activations activations;
  } kinds[] = {{"BF16", PLAIN, AS_BF16}, {"FP8", FP8_BLOCK, AS_BF16}, {"NVFP4", NVFP4, AS_BF16}, {"NVFP4, int8", NVFP4, AS_INT8}};
  const int64_t shapes[][2] = {{1, 16}, {67, 144}, {40, 1040}};
  for (const auto& [name, format, activations] : kinds)
    for (const auto& [out, in] : shapes) {
      Projection w(format, out, in);
      w.weight.activations = activations;
      const Halves x = random_halves(40 * in);
      const Floats values = activations == AS_INT8 ? in_integers(x) : values_of(x);
      Halves most;  // of 31 rows
      for (int64_t rows : {31, 1, 2, 4, 5, 40}) {
        Halves y(rows * out);
        kernels.linear({&w.weight, 0, x.data(), in, rows, y.data(), 2});
        const std::string what = std::string(name) + " " + std::to_string(rows) + " rows";
        compare(what, y, product(values, w.meaning.data(), rows, in, out));
        if (rows == 31) most = y;
        if (rows < 31 && !std::equal(y.begin(), y.end(), most.begin())) {
          std::fprintf(stderr, "%s: a row depends on its company\n", what.c_str());
          std::exit(1);
        }
      }
    }
}

void check_experts(const Kernels& kernels) {
  const int64_t experts = 4, hidden = 144, inner = 80, tokens = 41, k = 2;
  for (Format format : {PLAIN, NVFP4}) {
    const Projection gate_up(format, 2 * inner, hidden, experts), down(format, hidden, inner, experts);
    const Halves x = random_halves(tokens * hidden);
    const Floats values = values_of(x);
    std::vector<int64_t> ids(tokens * k);
    std::vector<float> weights(tokens * k);
    for (int64_t i = 0; i < tokens * k; i++) ids[i] = i % k ? static_cast<int64_t>(source() % 3) + 1 : 0, weights[i] = 0.25f * (i % 5);
    Halves y(tokens * hidden);
    kernels.experts({&gate_up.weight, &down.weight, x.data(), ids.data(), weights.data(), tokens, k, y.data(), 2});
    Floats expected(tokens * hidden);
    for (int64_t i = 0; i < tokens * k; i++) {
      const Floats row(values.begin() + i / k * hidden, values.begin() + (i / k + 1) * hidden);
      const Floats both = product(row, gate_up.meaning.data() + ids[i] * 2 * inner * hidden, 1, hidden, 2 * inner);
      Floats h(inner);
      for (int64_t j = 0; j < inner; j++) {
        const double gate = rounded(both[j]), up = rounded(both[inner + j]);
        h[j] = rounded(rounded(gate / (1 + std::exp(-gate))) * up);
      }
      const Floats out = product(h, down.meaning.data() + ids[i] * hidden * inner, 1, inner, hidden);
      for (int64_t o = 0; o < hidden; o++) expected[i / k * hidden + o] += rounded(out[o]) * weights[i];
    }
    compare("experts", y, expected, 4);
  }
}

void check_attention(const Kernels& kernels) {
  const int64_t heads = 5, block = 16;
  for (bool fp8 : {false, true})
    for (const int64_t latent : {64, 40}) {
      const int64_t rope = 8, width = latent + rope, context = 600, blocks = 38, tokens = 2;
      const Halves q = random_halves(tokens * heads * width), entries = random_halves(blocks * block * width);
      Floats keys = values_of(entries);
      std::vector<uint8_t> codes(keys.size());
      std::vector<int64_t> slots(blocks * block), table(blocks);
      for (int64_t i = 0; i < blocks * block; i++) slots[i] = i;
      for (int64_t i = 0; i < blocks; i++) table[i] = blocks - 1 - i;
      std::vector<uint8_t> cache(keys.size() * (fp8 ? 1 : 2));
      kernels.store_entries({entries.data(), blocks * block, width, slots.data(), blocks * block, cache.data(), fp8});
      for (size_t i = 0; i < keys.size() && fp8; i++) {
        if (std::fabs(e4m3(cache[i]) - keys[i]) > std::fmax(std::fabs(keys[i]) / 16, 0.001)) std::exit(1);
        keys[i] = e4m3(cache[i]);
      }
      const std::vector<int64_t> start{0, tokens}, lens{context};
      Halves out(tokens * heads * latent);
      AttentionArgs a{};
      a.q_latent = q.data(), a.q_rope = q.data() + latent;
      a.latent_strides[0] = a.rope_strides[0] = heads * width, a.latent_strides[1] = a.rope_strides[1] = width;
      a.heads = heads, a.latent = latent, a.rope = rope, a.cache = cache.data(), a.fp8 = fp8;
      a.blocks = blocks, a.block_size = block, a.block_tables = table.data(), a.table_stride = a.table_columns = blocks;
      a.tokens = tokens, a.requests = 1, a.query_start = start.data(), a.context_lens = lens.data();
      a.scale = 0.1f, a.output = out.data(), a.threads = 2;
      kernels.attention(a);
      Floats expected(tokens * heads * latent);
      for (int64_t r = 0; r < tokens * heads; r++) {
        const int64_t seen = context - tokens + r / heads + 1;
        Floats p(seen);
        double total = 0;
        for (int64_t i = 0; i < seen; i++) {
          const double* key = keys.data() + (table[i / block] * block + i % block) * width;
          for (int64_t d = 0; d < width; d++) p[i] += bf16(q[r * width + d]) * key[d];
          total += p[i] = std::exp(p[i] * static_cast<double>(a.scale));
        }
        for (int64_t i = 0; i < seen; i++)
          for (int64_t d = 0; d < latent; d++)
            expected[r * latent + d] += p[i] / total * keys[(table[i / block] * block + i % block) * width + d];
      }
      compare("attention", out, expected, 4);
    }
}

void check_heads(const Kernels& kernels) {
  const int64_t heads = 3, nope = 6, v = 10, tokens = 3;
  for (Format format : {PLAIN, FP8_BLOCK, NVFP4})
    for (const int64_t latent : {48, 144}) {
      const Projection w(format, heads * (nope + v), latent);
      const Halves q = random_halves(tokens * heads * nope), attended = random_halves(tokens * heads * latent);
      Halves absorbed(tokens * heads * latent), values(tokens * heads * v);
      kernels.absorb({&w.weight, q.data(), heads * nope, nope, tokens, heads, 0, nope, absorbed.data(), 2});
      kernels.per_head({&w.weight, attended.data(), heads * latent, latent, tokens, heads, nope, v, values.data(), 2});
      Floats expected(absorbed.size()), expected_values(values.size());
      for (int64_t r = 0; r < tokens * heads; r++) {
        const double* rows = w.meaning.data() + r % heads * (nope + v) * latent;
        for (int64_t d = 0; d < latent; d++) {
          for (int64_t n = 0; n < nope; n++) expected[r * latent + d] += bf16(q[r * nope + n]) * rows[n * latent + d];
          for (int64_t n = 0; n < v; n++)
            expected_values[r * v + n] += bf16(attended[r * latent + d]) * rows[(nope + n) * latent + d];
        }
      }
      compare("absorb", absorbed, expected);
      compare("values of heads", values, expected_values);
    }
}

void check_norm(const Kernels& kernels) {
  const int64_t rows = 3, n = 150;
  const Halves x = random_halves(rows * n), weight = random_halves(n);
  Halves y(rows * n);
  kernels.norm({x.data(), n, rows, n, weight.data(), 1e-6f, y.data(), 2});
  Floats expected(rows * n);
  for (int64_t r = 0; r < rows; r++) {
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += bf16(x[r * n + i]) * bf16(x[r * n + i]);
    for (int64_t i = 0; i < n; i++)
      expected[r * n + i] = bf16(weight[i]) * rounded(bf16(x[r * n + i]) / std::sqrt(squares / n + 1e-6));
  }
  compare("norm", y, expected);
}

void check(const char* name, const Kernels& kernels) {
  check_products(kernels);
  check_experts(kernels);
  check_attention(kernels);
  check_heads(kernels);
  check_norm(kernels);
  std::printf("%s holds\n", name);
}

}  // namespace

int main() {
  check("portable", portable_kernels);
#if defined(WITH_AVX2)
  check("avx2", avx2_kernels);
#endif
#if defined(WITH_AVX2_VNNI)
  check("avx2_vnni", avx2_vnni_kernels);
#endif
  return 0;
}
