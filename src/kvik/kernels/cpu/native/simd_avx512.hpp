// Vectors of 16 lanes (AVX-512 F, BW, DQ, VL). Included inside the namespace of an instruction set, after its switches:
// KVIK_HAS_VNNI and KVIK_HAS_BF16 say whether the dot products of narrow types are single instructions.

#define KVIK_HALVES 0
constexpr int kLanes = 16;
constexpr int kRowsInRegisters = 12;  // rows of a microkernel call: 12 x 2 accumulators of 32 registers
constexpr int kRowsOfPairs = kRowsInRegisters;
constexpr int kNibbleRows = 6;        // of int4: twice as many sums
constexpr int kAccumulators = 24;     // of decode attention
using F = __m512;
using I = __m512i;

static inline F loadf(const float* p) { return _mm512_loadu_ps(p); }
static inline void storef(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline F setf(float x) { return _mm512_set1_ps(x); }
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F divide(F a, F b) { return _mm512_div_ps(a, b); }
static inline F quotient(F a, F b) {  // relative error below 2^-22, in a third of a division's time; b finite, from 1 on
  F x = _mm512_rcp14_ps(b);
  return _mm512_mul_ps(a, _mm512_fnmadd_ps(_mm512_fmsub_ps(b, x, _mm512_set1_ps(1.0f)), x, x));
}
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F maxf(F a, F b) { return _mm512_max_ps(a, b); }
static inline F minf(F a, F b) { return _mm512_min_ps(a, b); }
static inline F absf(F a) { return _mm512_abs_ps(a); }

static inline I loadw(const void* p) { return _mm512_loadu_si512(p); }
static inline void storew(void* p, I x) { _mm512_storeu_si512(p, x); }
static inline I seti(int32_t x) { return _mm512_set1_epi32(x); }
static inline I bcastw(const uint32_t* p) { return _mm512_set1_epi32(int32_t(*p)); }
// The first n words at p, zeros beyond (which are not read).
static inline I loadw_first(const void* p, int n) {
  return _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1u), p);
}
static inline I addi(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
static inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
static inline I to_int(F x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
static inline I as_int(F x) { return _mm512_castps_si512(x); }
static inline F as_float(I x) { return _mm512_castsi512_ps(x); }
template <int N>
static inline I shift_left(I x) { return _mm512_slli_epi32(x, N); }

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
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline void store_bf16(uint16_t* p, F x) {  // to nearest, ties to even; NaN stays NaN
#if KVIK_HAS_BF16
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  I bits = as_int(x);
  I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), seti(1));
  I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(seti(0x7fff), odd));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_or_si512(bits, seti(0x400000)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
static inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline F load_s8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
static inline void store_s8(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }

static inline float sum(F x) { return _mm512_reduce_add_ps(x); }
static inline float largest(F x) { return _mm512_reduce_max_ps(x); }
static inline int32_t sumi(I x) { return _mm512_reduce_add_epi32(x); }

// acc + a * b of fp32 lanes
static inline F dot1(F acc, I a, I b) { return fma(as_float(a), as_float(b), acc); }

// acc + a.lo * b.lo + a.hi * b.hi of lanes that hold two bf16
static inline F dot2(F acc, I a, I b) {
#if KVIK_HAS_BF16
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  I high = seti(int32_t(0xffff0000u));
  acc = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), acc);
  return fma(as_float(_mm512_and_si512(a, high)), as_float(_mm512_and_si512(b, high)), acc);
#endif
}

// acc + sum of four products, w unsigned bytes, a signed bytes
static inline I dot4(I acc, I w, I a) {
#if KVIK_HAS_VNNI
  return _mm512_dpbusd_epi32(acc, w, a);
#else
  I even = _mm512_madd_epi16(_mm512_and_si512(w, seti(0x00ff00ff)), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
  I odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
  return addi(acc, addi(even, odd));
#endif
}

// Up to eight words of nibbles: begin with a sum, add dot products to what that gave, end with both.
#if KVIK_HAS_VNNI
static inline I nibbles_begin(I acc) { return acc; }
static inline I nibbles_dot(I part, I w, I a) { return dot4(part, w, a); }
static inline I nibbles_end(I, I part) { return part; }
#else  // 8 * 2 * 15 * 128 < 2^15
static inline I nibbles_begin(I) { return _mm512_setzero_si512(); }
static inline I nibbles_dot(I part, I w, I a) { return _mm512_add_epi16(part, _mm512_maddubs_epi16(w, a)); }
static inline I nibbles_end(I acc, I part) { return addi(acc, _mm512_madd_epi16(part, _mm512_set1_epi16(1))); }
#endif

// 2^x for x <= 127, relative error below 2e-7
static inline F exp2_f(F x) {
  F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(sub(x, whole)), whole);
}

// lane i of the result: the lanes of row i of p [16][16] combined by `op`
template <class Op>
static inline F reduce_rows(const float* p, Op op) {
  F x[4];
  for (int i = 0; i < 4; ++i) {
    F a = loadf(p + 64 * i), b = loadf(p + 64 * i + 16), c = loadf(p + 64 * i + 32), d = loadf(p + 64 * i + 48);
    F ab = op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    F cd = op(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    x[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
              _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  }
  F y0 = op(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
  F y1 = op(_mm512_shuffle_f32x4(x[2], x[3], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0xdd));
  return op(_mm512_shuffle_f32x4(y0, y1, 0x88), _mm512_shuffle_f32x4(y0, y1, 0xdd));
}

// dst[c * dst_stride + r] = src[r * src_stride + c] for r < rows <= 16, c < cols <= 16
static inline void transpose(const uint32_t* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride, int rows, int cols) {
  I r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? loadw_first(src + i * src_stride, cols) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 4) {
    I a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    I c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // t[4 g + j]: of rows 4 g .. 4 g + 3, columns j, 4 + j, 8 + j, 12 + j, one per 128-bit lane
  for (int j = 0; j < 4; ++j) {
    I a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    I c = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd), d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(a, b, 0x88), r[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88), r[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  __mmask16 mask = __mmask16((1u << rows) - 1u);
  for (int c = 0; c < cols; ++c) _mm512_mask_storeu_epi32(dst + c * dst_stride, mask, r[c]);
}

// out: the words (a[i], b[i]) for i < n <= 32, zeros beyond, 16 to a vector
static inline void zip16(const uint16_t* a, const uint16_t* b, int n, I* out) {
  const I low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                 35, 3, 34, 2, 33, 1, 32, 0);
  const I high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __mmask32 mask = __mmask32((uint64_t{1} << n) - 1u);
  I x = _mm512_maskz_loadu_epi16(mask, a), y = _mm512_maskz_loadu_epi16(mask, b);
  out[0] = _mm512_permutex2var_epi16(x, low, y);
  out[1] = _mm512_permutex2var_epi16(x, high, y);
}
