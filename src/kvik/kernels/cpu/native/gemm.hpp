// The microkernels: a tile of up to 12 rows of activations times one packed panel of 32 outputs, the same for every M.
// Included inside the namespace of an instruction set, after its simd header.
//
// Everything is counted in 32-bit words along k: a word is one fp32, two bf16 or four bytes. A panel stores, for each
// word, the 32 outputs side by side; a tile of activations stores, for each word, its rows side by side:
//
//     panel    word 0: | o0 o1 ... o31 |  word 1: | o0 o1 ... o31 |      128 bytes each
//     tile     word 0: | r0 r1 ... r11 |  word 1: | r0 r1 ... r11 |      4 * rows bytes each
//
// A row's result is the same chain of operations whatever the other rows are, so it does not depend on the batch.

struct Whole {  // words are multiplied as they lie in memory
  static constexpr int kParts = 1, kRows = kRowsInRegisters;
  static inline I weight(I w, int) { return w; }
};
struct Fp32Dot : Whole {
  using Acc = F;
  static inline Acc dot(Acc acc, I a, I b) { return dot1(acc, a, b); }
};
struct Bf16Dot : Whole {
  using Acc = F;
  static constexpr int kRows = kRowsOfPairs;
  static inline Acc dot(Acc acc, I a, I b) { return dot2(acc, a, b); }
};
#if KVIK_HALVES
// Projections are multiplied in halves of words. Those of activations lie side by side in a tile, taken apart once and not by
// every product.
struct Bf16Product {
  using Acc = F;
  static constexpr int kParts = 2, kRows = kRowsInRegisters;
  static inline I input(I x, int part) { return half_of_bf16(x, part); }
  static inline I weight(I w, int part) { return half_of_bf16(w, part); }
  static inline Acc dot(Acc acc, I a, I b) { return dot_halves(acc, a, b); }
};
struct Int8Product {  // weights are stored as unsigned bytes, 128 too large
  using Acc = I;
  static constexpr int kParts = 2, kRows = kRowsInRegisters;
  static inline I input(I x, int part) { return half_of_signed(x, part); }
  static inline I weight(I w, int part) { return half_of_unsigned(w, part); }
  static inline Acc dot(Acc acc, I a, I b) { return dot_halves(acc, a, b); }
};
#else
using Bf16Product = Bf16Dot;
struct Int8Product : Whole {  // as above
  using Acc = I;
  static inline Acc dot(Acc acc, I a, I b) { return dot4(acc, b, a); }
};
#endif

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline F start(const float* p) { return loadf(p); }
static inline I start(const int32_t* p) { return loadw(p); }
static inline void finish(float* p, F x) { storef(p, x); }
static inline void finish(int32_t* p, I x) { storew(p, x); }
static inline void clear(F& x) { x = setf(0); }
static inline void clear(I& x) { x = seti(0); }

constexpr int kVectors = kPanel / kLanes;  // of a panel's word
constexpr int kPrefetch = kLanes == 8 ? 1024 : 4096;  // bytes ahead of a panel that is streamed from memory: as measured
constexpr int kSlice = 96;                 // words of a panel in a slice of it: 12 KiB

// c[m][...] (+)= a . b for `Rows` rows and `Vecs` vectors of outputs. Word k of row m is a[k * a_step + m * AStride]; of two
// parts, the other one is half a step further.
template <class Dot, int Rows, int Vecs, int AStride, class C>
static inline void block(const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride, bool more) {
  typename Dot::Acc acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j)
      if (more) acc[m][j] = start(c + m * c_stride + j * kLanes);
      else clear(acc[m][j]);
  for (int k = 0; k < words; ++k) {
    if (Rows <= 8) prefetch(b + kPrefetch), prefetch(b + kPrefetch + 64);
#pragma GCC unroll 2
    for (int part = 0; part < Dot::kParts; ++part) {
      I w[Vecs];
#pragma GCC unroll 8
      for (int j = 0; j < Vecs; ++j) w[j] = Dot::weight(loadw(b + j * kLanes * 4), part);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        I x = bcastw(a + part * (a_step / Dot::kParts) + m * AStride);
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) {
          acc[m][j] = Dot::dot(acc[m][j], x, w[j]);
          if constexpr (Dot::kParts > 1 && Rows > 2) acc[m][j] = keep(acc[m][j]);
        }
      }
    }
    a += a_step;
    b += kPanel * 4;
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) finish(c + m * c_stride + j * kLanes, acc[m][j]);
}

// The whole panel for `Rows` rows: as many vectors at a time as the registers hold.
template <class Dot, int Rows, int AStride, class C>
static void rows_by_panel(const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride, bool more) {
  constexpr int kMost = 2 * Dot::kRows / Rows;
  constexpr int kAtOnce = kMost >= kVectors ? kVectors : kMost >= 4 ? 4 : 2;
  for (int j = 0; j < kVectors; j += kAtOnce)
    block<Dot, Rows, kAtOnce, AStride>(a, a_step, b + j * kLanes * 4, words, c + j * kLanes, c_stride, more);
}

// rows_by_panel for a number of rows known only now, 1 <= rows <= Rows
template <class Dot, int Rows, int AStride, class C>
static inline void some_rows(int rows, const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride,
                             bool more) {
  if constexpr (Rows > 1)
    if (rows < Rows) return some_rows<Dot, Rows - 1, AStride>(rows, a, a_step, b, words, c, c_stride, more);
  rows_by_panel<Dot, Rows, AStride>(a, a_step, b, words, c, c_stride, more);
}

// c [rows, 32] (+)= tile . panel, rows <= kMaxTile; see `block` for the layout of a. Where registers do not hold all rows, a
// slice of the panel stays in the first-level cache until all have passed.
template <class Dot, int AStride, class C>
static void gemm(int rows, const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride, bool more) {
  int slice = rows > Dot::kRows ? kSlice : words;
  for (int k = 0; k < words; k += slice, more = true)
    for (int m = 0, now; m < rows; m += now) {
      now = rows - m < Dot::kRows ? rows - m : Dot::kRows;
      some_rows<Dot, Dot::kRows, AStride>(now, a + k * a_step + m * AStride, a_step, b + int64_t{k} * kPanel * 4,
                                          words - k < slice ? words - k : slice, c + m * c_stride, c_stride, more);
    }
}

// int4 in groups of 32 * Subs: a panel is a sequence of group records, 64 + 512 * Subs bytes each:
//
//     | scale of o0 .. o31 (fp16) | words 0,1 | words 2,3 | words 4,5 | words 6,7 | next 32 inputs ... |
//
// 128 bytes hold two words of 32 outputs: the even word in the low nibbles, the odd one in the high nibbles, each value
// 8 too large. `sums` are -8 times the sum of a row's activations in the group, which takes the 8 out again.
template <int Rows, int Vecs, int Subs>
static inline void block_int4(const uint32_t* a, int tile_rows, const uint8_t* b, int groups, const float* scales,
                              const int32_t* sums, int first_vector, float* c) {
  F total[Rows][Vecs];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) total[m][j] = setf(0);
  for (int g = 0; g < groups; ++g) {
    I acc[Rows][Vecs];
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < Vecs; ++j) acc[m][j] = seti(sums[m]);
    const uint8_t* p = b + 64 + first_vector * kLanes * 4;
    for (int sub = 0; sub < Subs; ++sub) {
      I part[Rows][Vecs];
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) part[m][j] = nibbles_begin(acc[m][j]);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        if (Rows <= 8) prefetch(p + kPrefetch), prefetch(p + kPrefetch + 64);
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) {
          I both = loadw(p + j * kLanes * 4);
          I even = low_nibbles(both), odd = high_nibbles(both);
#pragma GCC unroll 16
          for (int m = 0; m < Rows; ++m) {
            part[m][j] = nibbles_dot(part[m][j], even, bcastw(a + m));
            part[m][j] = nibbles_dot(part[m][j], odd, bcastw(a + tile_rows + m));
          }
        }
        p += 128;
        a += 2 * tile_rows;
      }
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < Vecs; ++j) acc[m][j] = nibbles_end(acc[m][j], part[m][j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) {
      F w = load_f16((const uint16_t*)b + (first_vector + j) * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) total[m][j] = fma(to_float(acc[m][j]), mul(w, setf(scales[m])), total[m][j]);
    }
    b += 64 + 512 * Subs;
    scales += tile_rows;
    sums += tile_rows;
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) storef(c + m * kPanel + (first_vector + j) * kLanes, total[m][j]);
}

template <int Rows, int Subs>
static void rows_by_panel_int4(const uint32_t* a, int tile_rows, const uint8_t* b, int groups, const float* scales,
                               const int32_t* sums, float* c) {
  constexpr int kMost = 2 * kNibbleRows / Rows;
  constexpr int kAtOnce = kMost >= kVectors ? kVectors : kMost >= 2 ? 2 : 1;
  for (int j = 0; j < kVectors; j += kAtOnce)
    block_int4<Rows, kAtOnce, Subs>(a, tile_rows, b, groups, scales, sums, j, c);
}

template <int Rows, int Subs>
static inline void some_rows_int4(int rows, const uint32_t* a, int tile_rows, const uint8_t* b, int groups,
                                  const float* scales, const int32_t* sums, float* c) {
  if constexpr (Rows > 1)
    if (rows < Rows) return some_rows_int4<Rows - 1, Subs>(rows, a, tile_rows, b, groups, scales, sums, c);
  rows_by_panel_int4<Rows, Subs>(a, tile_rows, b, groups, scales, sums, c);
}

// c [rows, 32] = tile . panel for int4
template <int Subs>
static void gemm_int4(int rows, const uint32_t* a, const uint8_t* b, int groups, const float* scales,
                      const int32_t* sums, float* c) {
  constexpr int kMost = kNibbleRows;  // with two vectors: half as many loads
  for (int m = 0, now; m < rows; m += now) {
    int left = rows - m, turns = (left + kMost - 1) / kMost;
    now = (left + turns - 1) / turns;
    some_rows_int4<kMost, Subs>(now, a + m, rows, b, groups, scales + m, sums + m, c + m * kPanel);
  }
}
