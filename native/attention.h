// Absorbed multi-head latent attention over the paged cache: every (query, head) is a row that attends to the same
// entries. Keys are cut at fixed multiples of SPLIT, each piece gives a partial softmax, and pieces are merged in order;
// so a row's result depends on its own position alone, not on the batch, on drafts behind it or on threads.
#pragma once
#include "products.h"

namespace ISA {
namespace {

constexpr int64_t SPLIT = 512;
constexpr int64_t ROW_GROUP = 64;
constexpr int64_t ENTRIES_AHEAD = 8192;  // bytes to fetch ahead within a block
constexpr int64_t PARTIAL_BYTES = int64_t{32} << 20;  // requests are taken in groups whose partial results fit

// total[r * latent + d] = sum over keys of p[r * SPLIT + key] * entry[key][d]. Entries are FP32 here.
inline void weighted_sum(const float* p, const float* const* entry, int64_t keys, int64_t rows, int64_t latent, float* total) {
  constexpr int B = 4;  // vectors of sums at a time
  for (int64_t r = 0; r < rows; r++) {
    float* to = total + r * latent;
    const float* weight = p + r * SPLIT;  // 0: masked, or lost in FP32 anyway
    int64_t d = 0;
    for (; d + B * W <= latent; d += B * W) {
      vf sums[B] = {};
      for (int64_t key = 0; key < keys; key++)
        for (int i = 0; i < B && weight[key] != 0; i++)
          sums[i] = fma(splat(weight[key]), load(entry[key] + d + i * W), sums[i]);
      for (int i = 0; i < B; i++) store(to + d + i * W, sums[i]);
    }
    for (; d < latent; d++) {
      to[d] = 0;
      for (int64_t key = 0; key < keys; key++)
        if (weight[key] != 0) to[d] += weight[key] * entry[key][d];
    }
  }
}

#if defined(__AVX512BF16__)
// The same for latent % 32 == 0, rows of p p_stride apart, BF16 entries and probabilities; keys even (the last may be a row of zeros).
// M rows, B vectors of 32 dimensions at a time: entries are read in pieces of 64 * B bytes. FAR: they come from memory.
constexpr int64_t KEYS_AHEAD = 16;
template <int M, int B, bool FAR>
inline void weighted_sum_block(
    const uint16_t* p, int64_t p_stride, const uint16_t* const* entry, int64_t keys, int64_t d, int64_t latent,
    float* total) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  __m512 low[M][B] = {}, high[M][B] = {};
  for (int64_t key = 0; key < keys; key += 2) {
    __m512i weight[M];
    UNROLL for (int m = 0; m < M; m++) {
      int32_t pair;
      __builtin_memcpy(&pair, p + m * p_stride + key, 4);
      weight[m] = _mm512_set1_epi32(pair);
    }
    if constexpr (FAR) {
      const int64_t next = key + KEYS_AHEAD < keys ? key + KEYS_AHEAD : keys - 2;
      UNROLL for (int i = 0; i < B; i++) fetch(entry[next] + d + i * 32), fetch(entry[next + 1] + d + i * 32);
    }
    UNROLL for (int i = 0; i < B; i++) {
      __m512i a = _mm512_loadu_si512(entry[key] + d + i * 32), b = _mm512_loadu_si512(entry[key + 1] + d + i * 32);
      __m512i pairs_low = _mm512_unpacklo_epi16(a, b), pairs_high = _mm512_unpackhi_epi16(a, b);
      UNROLL for (int m = 0; m < M; m++) {
        low[m][i] = dot(low[m][i], pairs_low, weight[m]);
        high[m][i] = dot(high[m][i], pairs_high, weight[m]);
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int i = 0; i < B; i++) {
      float* to = total + m * latent + d + i * 32;
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(low[m][i], first, high[m][i]));
      _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low[m][i], second, high[m][i]));
    }
}

template <int M, bool FAR = false>
inline void weighted_sum_rows(
    const uint16_t* p, int64_t p_stride, const uint16_t* const* entry, int64_t keys, int64_t latent, float* total) {
  constexpr int B = M >= 8 ? 1 : M >= 4 ? 2 : M >= 2 ? 4 : 8;
  int64_t d = 0;
  for (; d + 32 * B <= latent; d += 32 * B) weighted_sum_block<M, B, FAR>(p, p_stride, entry, keys, d, latent, total);
  for (; d < latent; d += 32) weighted_sum_block<M, 1, FAR>(p, p_stride, entry, keys, d, latent, total);
}
#elif defined(__AVX2__)
// The same for latent % 16 == 0 and BF16 entries: M rows, B vectors of 16 dimensions at a time.
template <int M, int B>
inline void weighted_sum_block(
    const float* p, int64_t p_stride, const uint16_t* const* entry, int64_t keys, int64_t d, int64_t latent,
    float* total) {
  __m256 even[M][B] = {}, odd[M][B] = {};
  for (int64_t key = 0; key < keys; key++) {
    UNROLL for (int i = 0; i < B; i++) {
      const __m256i halves = load_bytes(entry[key] + d + i * 16);
      const __m256 values[2] = {even_halves(halves), odd_halves(halves)};
      UNROLL for (int m = 0; m < M; m++) {
        const __m256 weight = _mm256_broadcast_ss(p + m * p_stride + key);
        even[m][i] = _mm256_fmadd_ps(values[0], weight, even[m][i]);
        odd[m][i] = _mm256_fmadd_ps(values[1], weight, odd[m][i]);
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int i = 0; i < B; i++) {
      const __m256 low = _mm256_unpacklo_ps(even[m][i], odd[m][i]), high = _mm256_unpackhi_ps(even[m][i], odd[m][i]);
      float* to = total + m * latent + d + i * 16;
      _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
}

inline void weighted_sums(
    const float* p, int64_t p_stride, const uint16_t* const* entry, int64_t keys, int64_t rows, int64_t latent,
    float* total) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int64_t d = 0; d < latent; d += 16)
      weighted_sum_block<4, 1>(p + r * p_stride, p_stride, entry, keys, d, latent, total + r * latent);
  for (; r < rows; r++) {
    int64_t d = 0;
    for (; d + 64 <= latent; d += 64) weighted_sum_block<1, 4>(p + r * p_stride, p_stride, entry, keys, d, latent, total + r * latent);
    for (; d < latent; d += 16) weighted_sum_block<1, 1>(p + r * p_stride, p_stride, entry, keys, d, latent, total + r * latent);
  }
}
#endif

struct Piece {  // of one request: rows [row, row + rows) of the batch's (query, head) rows, keys [key, key + keys)
  int64_t request, row, rows, key, keys;
};

// Scores become probabilities relative to the row's largest one; returns that and their sum. Masked keys get zero.
inline void soften(float* s, int64_t visible, int64_t keys, float scale, float* largest, float* total) {
  vf top = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= visible; i += W) top = maximum(top, load(s + i));
  float m = -__builtin_inff();
  for (int j = 0; j < W; j++) m = top[j] > m ? top[j] : m;
  for (; i < visible; i++) m = s[i] > m ? s[i] : m;
  m *= scale;
  vf sums{};
  float buffer[W];
  for (i = 0; i < visible; i += W) {
    const int64_t left = visible - i;
    if (left >= W) {
      vf e = exponential(load(s + i) * scale - m);
      store(s + i, e);
      sums += e;
    } else {
      for (int j = 0; j < W; j++) buffer[j] = j < left ? s[i + j] * scale - m : -1000.0f;
      vf e = exponential(load(buffer));
      sums += e;
      store(buffer, e);
      for (int j = 0; j < left; j++) s[i + j] = buffer[j];
    }
  }
  for (i = visible > 0 ? visible : 0; i < keys; i++) s[i] = 0;
  *largest = m;
  *total = sum(sums);
}

// Entries are summed up as BF16 where their latents are so many times as long; E4M3 ones are then decoded first.
#if defined(__AVX512BF16__)
constexpr int64_t SUMMED = 32;
#elif defined(__AVX2__)
constexpr int64_t SUMMED = 16;
#else
constexpr int64_t SUMMED = 0;
#endif
inline bool are_summed([[maybe_unused]] int64_t latent) {
  if constexpr (SUMMED > 0) return latent % SUMMED == 0;
  return false;
}
inline Format entry_format(bool fp8) { return fp8 && SUMMED == 0 ? FP8_BLOCK : PLAIN; }

inline void attend(const AttentionArgs& a, const Rows& queries, const Piece& piece, float* out, float* largest, float* total) {
  const int64_t width = a.latent + a.rope, padded = ceil_div(width, 128) * 128;
  const int64_t keys = piece.keys, even = (keys + 1) / 2 * 2;
  View v{};
  v.format = entry_format(a.fp8);
  v.in = width;
  v.out = a.block_size;
  v.row_bytes = v.format == FP8_BLOCK ? width : 2 * width;
  v.factor = 1.0f;
  v.ahead = ENTRIES_AHEAD;
  v.end = 0;  // whatever lies behind a block is as good as anything
  const int64_t cached_bytes = a.fp8 ? width : 2 * width;
  Rows rows = queries;
  rows.base += piece.row * rows.row_bytes;
  rows.count = piece.rows;

  float* s = static_cast<float*>(scratch(SCRATCH_TILE, piece.rows * SPLIT * 6 + SPLIT * 8 + SPLIT * padded * 6));
  uint16_t* p = reinterpret_cast<uint16_t*>(s + piece.rows * SPLIT);
  const void** entry = reinterpret_cast<const void**>(p + piece.rows * SPLIT);
  float* floats = reinterpret_cast<float*>(entry + SPLIT);
  [[maybe_unused]] uint16_t* decoded = reinterpret_cast<uint16_t*>(floats + SPLIT * padded);

  const bool halves = are_summed(a.latent);
  const int64_t* table = a.block_tables + piece.request * a.table_stride;
  for (int64_t key = 0; key < keys;) {
    const int64_t block = table[(piece.key + key) / a.block_size], at = (piece.key + key) % a.block_size;
    const int64_t count = a.block_size - at < keys - key ? a.block_size - at : keys - key;
    v.values = a.cache + (block * a.block_size + at) * cached_bytes;
#if defined(__AVX2__)
    if (a.fp8) {
      for (int64_t i = 0; i < count; i++) decode_e4m3(v.values + i * width, width, decoded + (key + i) * width);
      v.values = reinterpret_cast<const uint8_t*>(decoded + key * width);
    }
#endif
    dot_product(v, 0, count, rows, s + key, SPLIT);
    for (int64_t i = 0; i < count; i++) {
      const uint8_t* from = v.values + i * v.row_bytes;
      entry[key + i] = from;
      if (halves) continue;
      float* to = floats + (key + i) * padded;
      int64_t d = 0;
      const uint16_t* values = reinterpret_cast<const uint16_t*>(from);
      if (v.format == FP8_BLOCK)
        for (; d + W <= a.latent; d += W) store(to + d, from_e4m3(from + d));
      else
        for (; d + W <= a.latent; d += W) store(to + d, load_bf16(values + d));
      for (; d < a.latent; d++) to[d] = v.format == FP8_BLOCK ? from_e4m3(from[d]) : from_bf16(values[d]);
      entry[key + i] = to;
    }
    key += count;
  }
  if (even > keys) {
    float* zeros = floats + (SPLIT - 1) * padded;  // keys is odd, so the last entry is free
    __builtin_memset(zeros, 0, padded * 4);
    entry[keys] = zeros;
  }
  const int64_t first_query = a.query_start[piece.request];
  const int64_t position0 = a.context_lens[piece.request] - (a.query_start[piece.request + 1] - first_query);
  for (int64_t r = 0; r < piece.rows; r++) {
    const int64_t position = position0 + (piece.row + r) / a.heads - first_query;
    int64_t visible = position + 1 - piece.key;
    visible = visible < 0 ? 0 : visible > keys ? keys : visible;
    soften(s + r * SPLIT, visible, keys, a.scale, largest + r, total + r);
    if (halves && SUMMED == 32) {
      for (int64_t i = 0; i < keys; i++) p[r * SPLIT + i] = to_bf16(s[r * SPLIT + i]);
      if (even > keys) p[r * SPLIT + keys] = 0;
    }
  }
#if defined(__AVX512BF16__)
  if (halves) {
    const uint16_t* const* entries = reinterpret_cast<const uint16_t* const*>(entry);
    int64_t r = 0;
    for (; r + 8 <= piece.rows; r += 8) weighted_sum_rows<8>(p + r * SPLIT, SPLIT, entries, even, a.latent, out + r * a.latent);
    for (; r + 2 <= piece.rows; r += 2) weighted_sum_rows<2>(p + r * SPLIT, SPLIT, entries, even, a.latent, out + r * a.latent);
    for (; r < piece.rows; r++) weighted_sum_rows<1>(p + r * SPLIT, SPLIT, entries, even, a.latent, out + r * a.latent);
    return;
  }
#elif defined(__AVX2__)
  if (halves) return weighted_sums(s, SPLIT, reinterpret_cast<const uint16_t* const*>(entry), keys, piece.rows, a.latent, out);
#endif
  weighted_sum(s, reinterpret_cast<const float* const*>(entry), keys, piece.rows, a.latent, out);
}

// Requests [begin, end), whose rows are [row0, row0 + rows).
inline void attention_group(
    const AttentionArgs& a, const Rows& queries, int64_t begin, int64_t end, int64_t pieces, int threads) {
  const int64_t row0 = a.query_start[begin] * a.heads, rows = a.query_start[end] * a.heads - row0;
  int64_t group = ROW_GROUP, items = 0;
  for (;; group /= 2) {
    items = 0;
    for (int64_t r = begin; r < end; r++)
      items += ceil_div((a.query_start[r + 1] - a.query_start[r]) * a.heads, group) * ceil_div(a.context_lens[r], SPLIT);
    if (items >= 2 * threads || group <= 8) break;
  }
  const int64_t partial = rows * pieces;
  uint8_t* memory = static_cast<uint8_t*>(scratch(SCRATCH_RESULT, partial * (a.latent + 2) * 4 + items * sizeof(Piece)));
  Piece* list = reinterpret_cast<Piece*>(memory);
  float* out = reinterpret_cast<float*>(list + items);
  float *largest = out + partial * a.latent, *total = largest + partial;
  int64_t n = 0;
  for (int64_t r = begin; r < end; r++) {
    const int64_t first = a.query_start[r] * a.heads, last = a.query_start[r + 1] * a.heads;
    for (int64_t key = 0; key < a.context_lens[r]; key += SPLIT)
      for (int64_t row = first; row < last; row += group) {
        const int64_t left = a.context_lens[r] - key;
        list[n++] = {r, row, last - row < group ? last - row : group, key, left < SPLIT ? left : SPLIT};
      }
  }
  parallel(threads, n, [&](int64_t item) {
    const Piece& piece = list[item];
    const int64_t at = piece.key / SPLIT * rows + piece.row - row0;
    attend(a, queries, piece, out + at * a.latent, largest + at, total + at);
  });
  constexpr int64_t MERGED = 16;  // rows a task
  parallel(threads, ceil_div(rows, MERGED), [&](int64_t item) {
    const int64_t stop = (item + 1) * MERGED < rows ? (item + 1) * MERGED : rows;
    int64_t request = begin;
    for (int64_t row = item * MERGED; row < stop; row++) {
      while ((row + row0) >= a.query_start[request + 1] * a.heads) request++;
      const int64_t splits = ceil_div(a.context_lens[request], SPLIT);
      float top = largest[row], sum_of_all = 0;
      for (int64_t i = 1; i < splits; i++) top = largest[i * rows + row] > top ? largest[i * rows + row] : top;
      float* result = out + row * a.latent;
      for (int64_t i = 0; i < splits; i++) {
        const int64_t at = i * rows + row;
        const float weight = splits == 1 ? 1.0f : exponential(splat(largest[at] - top))[0];
        sum_of_all += weight * total[at];
        if (splits == 1) break;
        if (i == 0) for (int64_t d = 0; d < a.latent; d++) result[d] *= weight;
        else if (weight > 0) for (int64_t d = 0; d < a.latent; d++) result[d] += weight * out[at * a.latent + d];
      }
      const float inverse = 1.0f / sum_of_all;
      for (int64_t d = 0; d < a.latent; d++) a.output[(row0 + row) * a.latent + d] = to_bf16(result[d] * inverse);
    }
  });
}

// Everything that the tables lead to lies in the cache, and every query in its own request.
inline void check_requests(const AttentionArgs& a) {
  check_range("the first query_start", a.query_start[0], 0, 0);
  for (int64_t r = 0; r < a.requests; r++) {
    const int64_t first = a.query_start[r], context = a.context_lens[r];
    check_range("query_start", a.query_start[r + 1], first, a.tokens);
    check_range("a context length", context, a.query_start[r + 1] - first, a.table_columns * a.block_size);
    const int64_t* table = a.block_tables + r * a.table_stride;
    for (int64_t i = 0; i * a.block_size < context; i++) check_range("a block id", table[i], 0, a.blocks - 1);
  }
  check_range("the last query_start", a.query_start[a.requests], a.tokens, a.tokens);
}

inline void attention(const AttentionArgs& a) {
  check_requests(a);
  Weight entries{};
  entries.format = entry_format(a.fp8);
  entries.in = a.latent + a.rope;
  const Layout layout = dot_layout(entries);
  const int64_t all = a.query_start[a.requests] * a.heads;
  void* memory = scratch(SCRATCH_INPUT, rows_bytes(layout, entries.in, all));
  const Rows queries = rows_in(static_cast<uint8_t*>(memory), layout, all);
  int64_t entries_read = 0, pairs = 0;
  for (int64_t r = 0; r < a.requests; r++) {
    entries_read += a.context_lens[r];
    pairs += a.context_lens[r] * (a.query_start[r + 1] - a.query_start[r]) * a.heads;
  }
  const int threads = useful_threads(a.threads, entries_read * entries.in * 2, pairs * entries.in * 4);
  parallel(threads, ceil_div(all, 16), [&](int64_t item) {
    uint16_t* joined = static_cast<uint16_t*>(scratch(SCRATCH_TILE, entries.in * 2));
    for (int64_t row = item * 16; row < (item + 1) * 16 && row < all; row++) {
      const int64_t token = row / a.heads, head = row % a.heads;
      const uint16_t* latent = a.q_latent + token * a.latent_strides[0] + head * a.latent_strides[1];
      const uint16_t* rope = a.q_rope + token * a.rope_strides[0] + head * a.rope_strides[1];
      __builtin_memcpy(joined, latent, a.latent * 2);
      __builtin_memcpy(joined + a.latent, rope, a.rope * 2);
      prepare_row(joined, entries.in, entries, layout, queries.at(row), queries.step);
    }
  });
  for (int64_t begin = 0; begin < a.requests;) {
    int64_t end = begin, pieces = 0;
    while (end < a.requests) {
      const int64_t more = ceil_div(a.context_lens[end], SPLIT), most = more > pieces ? more : pieces;
      const int64_t rows = (a.query_start[end + 1] - a.query_start[begin]) * a.heads;
      if (end > begin && rows * most * a.latent * 4 > PARTIAL_BYTES) break;
      pieces = most;
      end++;
    }
    attention_group(a, queries, begin, end, pieces, threads);
    begin = end;
  }
}

}  // namespace
}  // namespace ISA
