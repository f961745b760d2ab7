// One weight row decoded to FP32, for instruction sets and operations without a faster way.

inline void decode_block16(const uint8_t* packed, float scale, float* out) {
#if defined(__AVX2__)
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i low_bits = _mm_set1_epi8(15);
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  __m128i low = _mm_and_si128(bytes, low_bits), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits);
  __m128i values = _mm_shuffle_epi8(table, _mm_unpacklo_epi8(low, high));
  __m256 factor = _mm256_set1_ps(scale * 0.5f);
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)), factor));
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8))), factor));
#else
  float factor = scale * 0.5f;
  for (int i = 0; i < 8; i++) {
    out[2 * i] = TWICE_E2M1[packed[i] & 15] * factor;
    out[2 * i + 1] = TWICE_E2M1[packed[i] >> 4] * factor;
  }
#endif
}

// FP32 values of one weight row; the padding to a multiple of 128 is zero.
inline void decode_row(const View& v, int64_t row, float* out) {
  const uint8_t* values = v.values + row * v.row_bytes;
  int64_t padded = ceil_div(v.in, 128) * 128;
  for (int64_t i = v.in; i < padded; i++) out[i] = 0;
  if (v.format == NVFP4) {
    const uint8_t* scale = v.scale + row * v.scale_cols;
    for (int64_t b = 0; b < v.scale_cols; b++) decode_block16(values + b * 8, from_e4m3(scale[b]), out + b * 16);
  } else if (v.format == PLAIN) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(values);
    for (int64_t i = 0; i < v.in; i++) out[i] = from_bf16(halves[i]);
  } else {
    int64_t width = v.scale ? v.block_cols : v.in;
    for (int64_t c = 0; c < v.in; c += width) {
      float scale = block_scale(v, row, c / width);
      int64_t stop = c + width < v.in ? c + width : v.in;
      for (int64_t i = c; i < stop; i++) out[i] = from_e4m3(values[i]) * scale;
    }
  }
}
