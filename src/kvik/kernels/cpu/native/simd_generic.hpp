// Vectors of 4 lanes in the compiler's own vector types, for every architecture (NEON on ARM, SSE2 on old x86).

#define KVIK_HALVES 0
constexpr int kLanes = 4;
constexpr int kRowsInRegisters = 2;
constexpr int kRowsOfPairs = kRowsInRegisters;
constexpr int kNibbleRows = 1;
constexpr int kAccumulators = 8;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

static inline F loadf(const float* p) { F x; __builtin_memcpy(&x, p, 16); return x; }
static inline void storef(float* p, F x) { __builtin_memcpy(p, &x, 16); }
static inline F setf(float x) { return F{x, x, x, x}; }
static inline F add(F a, F b) { return a + b; }
static inline F sub(F a, F b) { return a - b; }
static inline F mul(F a, F b) { return a * b; }
static inline F divide(F a, F b) { return a / b; }
static inline F quotient(F a, F b) { return divide(a, b); }
static inline F fma(F a, F b, F c) { return a * b + c; }
static inline I loadw(const void* p) { I x; __builtin_memcpy(&x, p, 16); return x; }
static inline void storew(void* p, I x) { __builtin_memcpy(p, &x, 16); }
static inline I seti(int32_t x) { return I{x, x, x, x}; }
static inline I bcastw(const uint32_t* p) { return seti(int32_t(*p)); }
static inline I as_int(F x) { return (I)x; }
static inline F as_float(I x) { return (F)x; }
static inline F choose(I mask, F a, F b) { return as_float((as_int(a) & mask) | (as_int(b) & ~mask)); }
static inline F maxf(F a, F b) { return choose(a > b, a, b); }
static inline F minf(F a, F b) { return choose(a < b, a, b); }
static inline F absf(F a) { return as_float(as_int(a) & seti(0x7fffffff)); }

static inline I loadw_first(const void* p, int n) {
  I x = seti(0);
  __builtin_memcpy(&x, p, size_t(4 * (n < 4 ? n : 4)));
  return x;
}
static inline I addi(I a, I b) { return a + b; }
static inline I low_nibbles(I x) { return x & seti(0x0f0f0f0f); }
static inline I high_nibbles(I x) { return (x >> 4) & seti(0x0f0f0f0f); }
static inline F to_float(I x) { return __builtin_convertvector(x, F); }
static inline I to_int(F x) {  // to nearest, ties to even: adding 1.5 * 2^23 leaves the integer in the low bits
  return as_int(x + setf(12582912.0f)) - as_int(setf(12582912.0f));
}
template <int N>
static inline I shift_left(I x) { return x << N; }

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
  return as_float(I{int32_t(uint32_t(p[0]) << 16), int32_t(uint32_t(p[1]) << 16), int32_t(uint32_t(p[2]) << 16),
                    int32_t(uint32_t(p[3]) << 16)});
}
static inline void store_bf16(uint16_t* p, F x) {
  for (int i = 0; i < 4; ++i) {
    uint32_t bits = uint32_t(as_int(x)[i]);
    bits = x[i] == x[i] ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
    p[i] = uint16_t(bits >> 16);
  }
}
static inline float half_to_float(uint32_t h) {
  uint32_t sign = (h & 0x8000) << 16, rest = h & 0x7fff;
  F scaled = as_float(seti(int32_t(rest << 13)));  // 2^-112 of the value; denormals too
  uint32_t bits = uint32_t(as_int(scaled * setf(5.192296858534828e33f))[0]);
  if (rest >= 0x7c00) bits = (rest << 13) | 0x7f800000;
  return as_float(seti(int32_t(bits | sign)))[0];
}
static inline F load_f16(const uint16_t* p) {
  return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
static inline F load_s8(const int8_t* p) { return F{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
static inline void store_s8(int8_t* p, I x) {
  for (int i = 0; i < 4; ++i) p[i] = int8_t(x[i]);
}

static inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
static inline float largest(F x) {
  F y = maxf(x, F{x[2], x[3], x[0], x[1]});
  return y[0] > y[1] ? y[0] : y[1];
}
static inline int32_t sumi(I x) { return x[0] + x[1] + x[2] + x[3]; }

static inline F dot1(F acc, I a, I b) { return fma(as_float(a), as_float(b), acc); }
static inline F dot2(F acc, I a, I b) {
  I high = seti(int32_t(0xffff0000u));
  acc = fma(as_float(a << 16), as_float(b << 16), acc);
  return fma(as_float(a & high), as_float(b & high), acc);
}
static inline I dot4(I acc, I w, I a) {
  I byte = seti(0xff);
  acc += (w & byte) * ((a << 24) >> 24) + ((w >> 8) & byte) * ((a << 16) >> 24);
  return acc + ((w >> 16) & byte) * ((a << 8) >> 24) + ((w >> 24) & byte) * (a >> 24);
}

static inline I nibbles_begin(I acc) { return acc; }
static inline I nibbles_dot(I part, I w, I a) { return dot4(part, w, a); }
static inline I nibbles_end(I, I part) { return part; }

// 2^x for x <= 127, relative error below 2e-7; from -126 on down it stays 2^-126
static inline F exp2_f(F x) {
  x = maxf(x, setf(-126.0f));
  I n = to_int(x);
  return mul(exp2_fraction(sub(x, to_float(n))), as_float(shift_left<23>(addi(n, seti(127)))));
}

// lane i of the result: the lanes of row i of p [4][4] combined by `op`
template <class Op>
static inline F reduce_rows(const float* p, Op op) {
  F a = loadf(p), b = loadf(p + 4), c = loadf(p + 8), d = loadf(p + 12);
  F x = op(F{a[0], b[0], c[0], d[0]}, F{a[2], b[2], c[2], d[2]});
  return op(x, op(F{a[1], b[1], c[1], d[1]}, F{a[3], b[3], c[3], d[3]}));
}

static inline void transpose(const uint32_t* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride, int rows, int cols) {
  for (int c = 0; c < cols; ++c)
    for (int r = 0; r < rows; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
}
static inline void zip16(const uint16_t* a, const uint16_t* b, int n, I* out) {
  uint32_t words[32];
  for (int i = 0; i < 32; ++i) words[i] = i < n ? uint32_t(a[i]) | uint32_t(b[i]) << 16 : 0;
  for (int i = 0; i < 8; ++i) out[i] = loadw(words + 4 * i);
}
