// Vectors of 8 lanes (AVX2, FMA, F16C). Included inside the namespace of the instruction set.

constexpr int kLanes = 8;
constexpr int kRowsInRegisters = 4;  // rows of a microkernel call: 4 x 2 accumulators of 16 registers
using F = __m256;
using I = __m256i;

static inline F loadf(const float* p) { return _mm256_loadu_ps(p); }
static inline void storef(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline F setf(float x) { return _mm256_set1_ps(x); }
static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F divide(F a, F b) { return _mm256_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F maxf(F a, F b) { return _mm256_max_ps(a, b); }
static inline F minf(F a, F b) { return _mm256_min_ps(a, b); }
static inline F absf(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

static inline I loadw(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void storew(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
static inline I seti(int32_t x) { return _mm256_set1_epi32(x); }
static inline I bcastw(const uint32_t* p) { return _mm256_set1_epi32(int32_t(*p)); }
static inline I first_lanes(int n) {
  return _mm256_cmpgt_epi32(seti(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
static inline I loadw_first(const void* p, int n) { return _mm256_maskload_epi32((const int*)p, first_lanes(n)); }
static inline I addi(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
static inline I high_nibbles(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
static inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
static inline I to_int(F x) { return _mm256_cvtps_epi32(x); }  // to nearest, ties to even
static inline I as_int(F x) { return _mm256_castps_si256(x); }
static inline F as_float(I x) { return _mm256_castsi256_ps(x); }
template <int N>
static inline I shift_left(I x) { return _mm256_slli_epi32(x, N); }

static inline F load_bf16(const uint16_t* p) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline void store_bf16(uint16_t* p, F x) {  // to nearest, ties to even; infinities and NaN stay what they are
  I bits = as_int(x);
  I rounded = addi(bits, addi(seti(0x7fff), _mm256_and_si256(_mm256_srli_epi32(bits, 16), seti(1))));
  I nan = as_int(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(bits, seti(0x400000)), nan), 16);
  I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store_s8(int8_t* p, I x) {
  alignas(32) int32_t lanes[8];
  storew(lanes, x);
  for (int i = 0; i < 8; ++i) p[i] = int8_t(lanes[i]);
}

static inline float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
static inline float largest(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
static inline int32_t sumi(I x) {
  alignas(32) int32_t lanes[8];
  storew(lanes, x);
  int32_t total = 0;
  for (int i = 0; i < 8; ++i) total += lanes[i];
  return total;
}

static inline F dot1(F acc, I a, I b) { return fma(as_float(a), as_float(b), acc); }

static inline F dot2(F acc, I a, I b) {
  I high = seti(int32_t(0xffff0000u));
  acc = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), acc);
  return fma(as_float(_mm256_and_si256(a, high)), as_float(_mm256_and_si256(b, high)), acc);
}

static inline I dot4(I acc, I w, I a) {
  I even = _mm256_madd_epi16(_mm256_and_si256(w, seti(0x00ff00ff)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  I odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
  return addi(acc, addi(even, odd));
}

static inline F row_sums(const float* p) {
  F a = _mm256_hadd_ps(_mm256_hadd_ps(loadf(p), loadf(p + 8)), _mm256_hadd_ps(loadf(p + 16), loadf(p + 24)));
  F b = _mm256_hadd_ps(_mm256_hadd_ps(loadf(p + 32), loadf(p + 40)), _mm256_hadd_ps(loadf(p + 48), loadf(p + 56)));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

static inline void transpose(const uint32_t* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride, int rows, int cols) {
  I r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = i < rows ? loadw_first(src + i * src_stride, cols) : _mm256_setzero_si256();
  for (int i = 0; i < 8; i += 4) {
    I a = _mm256_unpacklo_epi32(r[i], r[i + 1]), b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    I c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm256_unpacklo_epi64(a, c), t[i + 1] = _mm256_unpackhi_epi64(a, c);
    t[i + 2] = _mm256_unpacklo_epi64(b, d), t[i + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
    r[4 + j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
  }
  I mask = first_lanes(rows);
  for (int c = 0; c < cols; ++c) _mm256_maskstore_epi32((int*)(dst + c * dst_stride), mask, r[c]);
}

static inline void zip16(const uint16_t* a, const uint16_t* b, int n, uint32_t* out) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i x = _mm_loadu_si128((const __m128i*)(a + i)), y = _mm_loadu_si128((const __m128i*)(b + i));
    _mm_storeu_si128((__m128i*)(out + i), _mm_unpacklo_epi16(x, y));
    _mm_storeu_si128((__m128i*)(out + i + 4), _mm_unpackhi_epi16(x, y));
  }
  for (; i < 32; ++i) out[i] = i < n ? uint32_t(a[i]) | uint32_t(b[i]) << 16 : 0;
}
