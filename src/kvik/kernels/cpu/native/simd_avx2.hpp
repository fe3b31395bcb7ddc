// Vectors of 8 lanes (AVX2, FMA, F16C). Included inside the namespace of the instruction set.

#define KVIK_HALVES 1  // products of bf16 and of bytes are two, of halves of words
constexpr int kLanes = 8;
constexpr int kRowsInRegisters = 6;  // rows of a microkernel call: 6 x 2 accumulators of 16 registers
constexpr int kRowsOfPairs = 4;      // of bf16 that are taken apart at every product
constexpr int kNibbleRows = 3;       // of int4: twice as many sums
constexpr int kAccumulators = 8;     // of decode attention
using F = __m256;
using I = __m256i;

static inline F loadf(const float* p) { return _mm256_loadu_ps(p); }
static inline void storef(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline F setf(float x) { return _mm256_set1_ps(x); }
static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F divide(F a, F b) { return _mm256_div_ps(a, b); }
static inline F quotient(F a, F b) { return divide(a, b); }
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

// 2^x for |x| <= 0.5: the Taylor series of degree 6, whose remainder is below 1.3e-7
static inline F exp2_fraction(F x) {
  F p = fma(setf(1.5403530e-4f), x, setf(1.3333558e-3f));
  p = fma(p, x, setf(9.6181291e-3f));
  p = fma(p, x, setf(5.5504109e-2f));
  p = fma(p, x, setf(2.4022651e-1f));
  p = fma(p, x, setf(6.9314718e-1f));
  return fma(p, x, setf(1.0f));
}

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
static inline F load_s8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
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

// x, computed here: the compiler would put the additions of a long chain off, and what they add into memory meanwhile.
template <class V>
static inline V keep(V x) {
  asm volatile("" : "+x"(x));
  return x;
}

static inline F dot1(F acc, I a, I b) { return fma(as_float(a), as_float(b), acc); }

static inline F dot2(F acc, I a, I b) {
  I high = seti(int32_t(0xffff0000u));
  acc = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), acc);
  return fma(as_float(_mm256_and_si256(a, high)), as_float(_mm256_and_si256(b, high)), acc);
}

// Halves of words: of two bf16 as fp32, of four bytes as 16 bits. `dot_halves` adds the products of bytes.
static inline I half_of_bf16(I x, int part) {
  return part ? _mm256_and_si256(x, seti(int32_t(0xffff0000u))) : shift_left<16>(x);
}
static inline I half_of_signed(I x, int part) { return _mm256_srai_epi16(part ? x : _mm256_slli_epi16(x, 8), 8); }
static inline I half_of_unsigned(I x, int part) {
  return part ? _mm256_srli_epi16(x, 8) : _mm256_and_si256(x, seti(0x00ff00ff));
}
static inline I dot_halves(I acc, I a, I b) { return addi(acc, _mm256_madd_epi16(a, b)); }
static inline F dot_halves(F acc, I a, I b) { return fma(as_float(a), as_float(b), acc); }

// Sums of eight words of nibbles fit in 16 bits: 8 * 2 * 15 * 128 < 2^15.
static inline I nibbles_begin(I) { return _mm256_setzero_si256(); }
static inline I nibbles_dot(I part, I w, I a) { return keep(_mm256_add_epi16(part, _mm256_maddubs_epi16(w, a))); }
static inline I nibbles_end(I acc, I part) { return addi(acc, _mm256_madd_epi16(part, _mm256_set1_epi16(1))); }

// 2^x for x <= 127, relative error below 2e-7; from -126 on down it stays 2^-126
static inline F exp2_f(F x) {
  x = maxf(x, setf(-126.0f));
  I n = to_int(x);
  return mul(exp2_fraction(sub(x, to_float(n))), as_float(shift_left<23>(addi(n, seti(127)))));
}

// lane i of the result: the lanes of row i of p [8][8] combined by `op`
template <class Op>
static inline F reduce_rows(const float* p, Op op) {
  F x[2];
  for (int i = 0; i < 2; ++i) {
    F a = loadf(p + 32 * i), b = loadf(p + 32 * i + 8), c = loadf(p + 32 * i + 16), d = loadf(p + 32 * i + 24);
    F ab = op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    F cd = op(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    x[i] = op(_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))),
              _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))));
  }
  return op(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
}

static inline void transpose(const uint32_t* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride, int rows, int cols) {
  if (rows <= 2) {  // of few who decode: the masked stores below are slow on some processors
    for (int c = 0; c < cols; ++c)
      for (int r = 0; r < rows; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
    return;
  }
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
  if (rows == 8) {
    for (int c = 0; c < cols; ++c) storew(dst + c * dst_stride, r[c]);
  } else if (rows == 4) {
    for (int c = 0; c < cols; ++c) _mm_storeu_si128((__m128i*)(dst + c * dst_stride), _mm256_castsi256_si128(r[c]));
  } else {
    I mask = first_lanes(rows);
    for (int c = 0; c < cols; ++c) _mm256_maskstore_epi32((int*)(dst + c * dst_stride), mask, r[c]);
  }
}

static inline void zip16(const uint16_t* a, const uint16_t* b, int n, I* out) {
  alignas(32) uint16_t x[32] = {}, y[32] = {};
  if (n < 32) {
    for (int i = 0; i < n; ++i) x[i] = a[i], y[i] = b[i];
    a = x, b = y;
  }
  for (int i = 0; i < 4; ++i) {
    __m128i u = _mm_loadu_si128((const __m128i*)(a + 8 * i)), v = _mm_loadu_si128((const __m128i*)(b + 8 * i));
    out[i] = _mm256_set_m128i(_mm_unpackhi_epi16(u, v), _mm_unpacklo_epi16(u, v));
  }
}
