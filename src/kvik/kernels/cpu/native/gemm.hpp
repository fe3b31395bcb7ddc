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

struct Fp32Dot {
  using Acc = F;
  static inline Acc dot(Acc acc, I a, I b) { return dot1(acc, a, b); }
};
struct Bf16Dot {
  using Acc = F;
  static inline Acc dot(Acc acc, I a, I b) { return dot2(acc, a, b); }
};
struct Int8Dot {  // weights are stored as unsigned bytes, 128 too large
  using Acc = I;
  static inline Acc dot(Acc acc, I a, I b) { return dot4(acc, b, a); }
};

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline F start(const float* p) { return loadf(p); }
static inline I start(const int32_t* p) { return loadw(p); }
static inline void finish(float* p, F x) { storef(p, x); }
static inline void finish(int32_t* p, I x) { storew(p, x); }
static inline void clear(F& x) { x = setf(0); }
static inline void clear(I& x) { x = seti(0); }

constexpr int kVectors = kPanel / kLanes;  // of a panel's word
constexpr int kPrefetch = 4096;            // bytes ahead of a panel that is streamed from memory

// c[m][...] (+)= a . b for `Rows` rows and `Vecs` vectors of outputs. Word k of row m is a[k * a_step + m * AStride].
template <class Dot, int Rows, int Vecs, int AStride, bool Accumulate, class C>
static inline void block(const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride) {
  typename Dot::Acc acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j)
      if (Accumulate) acc[m][j] = start(c + m * c_stride + j * kLanes);
      else clear(acc[m][j]);
  for (int k = 0; k < words; ++k) {
    I w[Vecs];
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) w[j] = loadw(b + j * kLanes * 4);
    if (Rows <= 8 && !Accumulate) prefetch(b + kPrefetch), prefetch(b + kPrefetch + 64);
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      I x = bcastw(a + m * AStride);
#pragma GCC unroll 8
      for (int j = 0; j < Vecs; ++j) acc[m][j] = Dot::dot(acc[m][j], x, w[j]);
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
template <class Dot, int Rows, int AStride, bool Accumulate, class C>
static void rows_by_panel(const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride) {
  constexpr int kMost = 2 * kRowsInRegisters / Rows;
  constexpr int kAtOnce = kMost >= kVectors ? kVectors : kMost >= 4 ? 4 : 2;
  for (int j = 0; j < kVectors; j += kAtOnce)
    block<Dot, Rows, kAtOnce, AStride, Accumulate>(a, a_step, b + j * kLanes * 4, words, c + j * kLanes, c_stride);
}

// rows_by_panel for a number of rows known only now, 1 <= rows <= Rows
template <class Dot, int Rows, int AStride, bool Accumulate, class C>
static inline void some_rows(int rows, const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride) {
  if constexpr (Rows > 1)
    if (rows < Rows) return some_rows<Dot, Rows - 1, AStride, Accumulate>(rows, a, a_step, b, words, c, c_stride);
  rows_by_panel<Dot, Rows, AStride, Accumulate>(a, a_step, b, words, c, c_stride);
}

// c [rows, 32] (+)= tile . panel, rows <= kMaxTile; see `block` for the layout of a.
template <class Dot, int AStride, bool Accumulate, class C>
static void gemm(int rows, const uint32_t* a, int64_t a_step, const uint8_t* b, int words, C* c, int64_t c_stride) {
  for (int now; rows > 0; rows -= now, a += now * AStride, c += now * c_stride) {
    now = rows < kRowsInRegisters ? rows : kRowsInRegisters;
    some_rows<Dot, kRowsInRegisters, AStride, Accumulate>(now, a, a_step, b, words, c, c_stride);
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
  constexpr int kMost = kRowsInRegisters / Rows;
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
  constexpr int kMost = kRowsInRegisters / 2 < 1 ? 1 : kRowsInRegisters / 2;  // with two vectors: half as many loads
  for (int m = 0, now; m < rows; m += now) {
    int left = rows - m, turns = (left + kMost - 1) / kMost;
    now = (left + turns - 1) / turns;
    some_rows_int4<kMost, Subs>(now, a + m, rows, b, groups, scales + m, sums + m, c + m * kPanel);
  }
}
