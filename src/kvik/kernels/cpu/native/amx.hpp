// Products on tile registers (AMX): projections of bf16 and int8 weights whose inputs fill whole steps, and the products
// of prefill attention in bf16. Included after linear.hpp, before attention_prefill.hpp.
//
//     A   16 rows of activations, 64 bytes (a step) of k each; packed [half of the tile][step][row][64 bytes]
//     B   16 words of k of 16 outputs: half of a panel's columns, which lies there already, rows 128 bytes apart
//     C   16 rows, 16 outputs; two halves of a tile times two of a panel are four of the eight registers
//
// A row's sum goes through the same steps for any number of rows, so here too it does not depend on the batch. Integer
// sums are exact, so int8 has the bits of the other instruction sets.
//
// A panel is multiplied slice by slice: its part of a slice stays in the first-level cache while the tiles come from the
// second, and sums wait in memory for the next slice.

constexpr int kTileRows = 16;    // of a register
constexpr int kRowsAtOnce = 2 * kTileRows;
constexpr int kStepWords = 16;   // of k, which one product takes
constexpr int kSliceSteps = 8;   // 16 KiB of a panel

static inline bool on_tiles(const KvikLinear& w) {
  return (w.format == KVIK_BF16 && w.k % (2 * kStepWords) == 0) || (w.format == KVIK_INT8 && w.k % (4 * kStepWords) == 0);
}

static inline int64_t min_int64(int64_t a, int64_t b) { return a < b ? a : b; }

static int rows_at_once(const KvikLinear& w) { return on_tiles(w) ? kRowsAtOnce : kMaxTile; }

// Registers 0 to 3 are C, 4 and 5 A, 6 and 7 B. Fewer rows than a register has make a product of few rows faster.
static void configure(Scratch& scratch, int rows) {
  if (scratch.tile_rows == rows) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = uint8_t(i < 6 ? rows : kTileRows);
  opaque(&config);  // the intrinsic does not say that it reads all of it
  _tile_loadconfig(&config);
  scratch.tile_rows = rows;
}

static void leave_tiles(Scratch& scratch) {
  if (scratch.tile_rows) _tile_release();
  scratch.tile_rows = 0;
}

static TileView wide_view(const Job& job, int tile) {
  uint32_t* words = (uint32_t*)(job.activations + job.tile_bytes * tile);
  int tokens = job.tiling.size(tile), rows = tokens * rows_per_token(*job.op->linear);
  float* scales = (float*)(words + int64_t{job.op->linear->words} * kRowsAtOnce);
  return {words, scales, (int32_t*)(scales + rows), job.tiling.start(tile), tokens, rows};
}

// 16 rows or fewer, step by step, so that what is written follows on: [step][row][64 bytes].
static void pack_bf16(const KvikOp& op, int row, int count, uint32_t* out) {
  int steps = op.linear->words / kStepWords;
  const float* x = (const float*)op.x + row * op.width;
  F factors[kTileRows];
  if (op.norm)
    for (int m = 0; m < count; ++m) factors[m] = setf(rms_inverse(x + m * op.width, op.eps, op.linear->k));
  for (int s = 0; s < steps; ++s, x += 2 * kLanes, out += kTileRows * kStepWords)
    for (int m = 0; m < count; ++m)
      for (int i = 0; i < 2 * kLanes; i += kLanes) {
        F value = loadf(x + m * op.width + i);
        if (op.norm) value = mul(mul(value, factors[m]), loadf(op.norm + s * 2 * kLanes + i));
        store_bf16((uint16_t*)(out + m * kStepWords) + i, value);
      }
}

static void pack_int8(const KvikOp& op, const TileView& view, Scratch& scratch) {
  int k = op.linear->k, steps = op.linear->words / kStepWords, times = rows_per_token(*op.linear);
  float* row = (float*)scratch.get((sizeof(float) + size_t(times)) * size_t(k));
  int8_t* bytes = (int8_t*)(row + k);
  for (int m = 0; m < view.rows; ++m) {
    if (m % times == 0) {
      normalise((const float*)op.x + (view.start + m / times) * op.width, op.norm, op.eps, k, k, row);
      quantise_rows(row, k, times, bytes, k, view.scales + m, view.sums + m);
    }
    uint32_t* out = view.words + (int64_t{m / kTileRows} * steps * kTileRows + m % kTileRows) * kStepWords;
    for (int s = 0; s < steps; ++s, out += kTileRows * kStepWords) storew(out, loadw(bytes + m % times * k + s * 64));
  }
}

static void prepare_tiles(const Job& job, int tile, Scratch& scratch) {
  const KvikOp& op = *job.op;
  if (!on_tiles(*op.linear)) return linear_prepare(job, tile, scratch);
  TileView view = wide_view(job, tile);
  if (op.linear->format == KVIK_INT8) return pack_int8(op, view, scratch);
  for (int m = 0; m < view.rows; m += kTileRows)
    pack_bf16(op, view.start + m, min_int(kTileRows, view.rows - m), view.words + int64_t{m} * op.linear->words);
}

struct Rows {  // of A: distances in bytes between rows, between steps, and from the first 16 rows to the others
  const void* data;
  int64_t row, step, half;
};

struct Sums {  // of C: distance in bytes between rows
  void* data;
  int64_t row;
};

// c [32 or 16][32] (+)= A . B over `steps` steps
template <bool Int8, bool Two, bool Fetch>
static inline void multiply_tiles(const Rows& rows, const uint8_t* b, int steps, bool more, const Sums& sums) {
  constexpr int kStride = kPanel * 4;
  const uint8_t* a = (const uint8_t*)rows.data;
  uint8_t* c = (uint8_t*)sums.data;
  uint8_t* below = c + sums.row * kTileRows;
  if (more) {
    _tile_loadd(0, c, sums.row);
    _tile_loadd(1, c + 64, sums.row);
    if (Two) _tile_loadd(2, below, sums.row);
    if (Two) _tile_loadd(3, below + 64, sums.row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (Two) _tile_zero(2);
    if (Two) _tile_zero(3);
  }
  for (int s = 0; s < steps; ++s, a += rows.step, b += kStride * kStepWords) {
    if (Fetch)
      for (int i = 0; i < kStride * kStepWords; i += 64) prefetch(b + kPrefetch + i);
    _tile_loadd(6, b, kStride);
    _tile_loadd(4, a, rows.row);
    _tile_loadd(7, b + 64, kStride);
    if (Two) _tile_loadd(5, a + rows.half, rows.row);
    if constexpr (Int8) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (Two) _tile_dpbsud(2, 5, 6);
      if (Two) _tile_dpbsud(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (Two) _tile_dpbf16ps(2, 5, 6);
      if (Two) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, sums.row);
  _tile_stored(1, c + 64, sums.row);
  if (Two) _tile_stored(2, below, sums.row);
  if (Two) _tile_stored(3, below + 64, sums.row);
}

template <bool Int8>
static void multiply_rows(int count, bool fetch, const Rows& rows, const uint8_t* b, int steps, bool more, const Sums& sums) {
  if (count > kTileRows) multiply_tiles<Int8, true, false>(rows, b, steps, more, sums);
  else if (fetch) multiply_tiles<Int8, false, true>(rows, b, steps, more, sums);
  else multiply_tiles<Int8, false, false>(rows, b, steps, more, sums);
}

// What the epilogue is about to write comes into the cache while the tiles are multiplied.
static inline void fetch_results(const KvikOp& op, int panel, const TileView& view) {
  const KvikLinear& w = *op.linear;
  int width = w.swiglu ? w.n / 2 : w.n, step = w.swiglu ? kPanel / 2 : kPanel;
  const float* y = (const float*)op.y + int64_t{view.start} * width + panel * step;
  for (int m = 0; m < view.tokens; ++m, y += width) {
    __builtin_prefetch(y, 1, 2);
    __builtin_prefetch(y + step - 1, 1, 2);
  }
}

static void gemm_tiles(const Job& job, int item, Scratch& scratch) {
  const KvikOp& op = *job.op;
  const KvikLinear& w = *op.linear;
  if (!on_tiles(w)) return linear_gemm(job, item, scratch);
  int panel = item % w.panels, first = item / w.panels * job.tiles_per_item;
  int last = min_int(first + job.tiles_per_item, job.tiling.tiles), count = last - first;
  int steps = w.words / kStepWords, slice = count > 1 ? kSliceSteps : steps;
  const uint8_t* data = w.data + w.panel_bytes * panel;
  // With several tiles, the panel that this worker probably takes next comes in meanwhile, a part with every tile.
  const uint8_t* next = panel + 1 < w.panels && count > 1 ? data + w.panel_bytes : nullptr;
  int64_t turns = int64_t{(steps + slice - 1) / slice} * count, fetched = 0;
  int64_t part = (w.panel_bytes / turns + 63) / 64 * 64, half = int64_t{steps} * kTileRows * 64;
  configure(scratch, min_int(job.rows * rows_per_token(w), kTileRows));
  float* sums = (float*)scratch.get(sizeof(float) * kRowsAtOnce * kPanel * size_t(count));
  for (int from = 0; from < steps; from += slice) {
    int now = min_int(slice, steps - from);
    for (int i = 0; i < count; ++i) {
      if (next)
        for (int64_t end = min_int64(fetched + part, w.panel_bytes); fetched < end; fetched += 64)
          __builtin_prefetch(next + fetched, 0, 2);
      TileView view = wide_view(job, first + i);
      if (from + now == steps) fetch_results(op, panel, view);
      Rows a{view.words + int64_t{from} * kTileRows * kStepWords, 64, 64 * kTileRows, half};
      const uint8_t* b = data + int64_t{from} * kStepWords * kPanel * 4;
      float* c = sums + i * kRowsAtOnce * kPanel;
      if (w.format == KVIK_INT8) multiply_rows<true>(view.rows, count == 1, a, b, now, from > 0, {c, kPanel * 4});
      else multiply_rows<false>(view.rows, count == 1, a, b, now, from > 0, {c, kPanel * 4});
      if (from + now == steps) epilogue(op, panel, view, c);
    }
  }
}

// As `peak`, with the products that the projections use.
static void peak_tiles(int format, int64_t products, Scratch& scratch) {
  if (format == KVIK_FP32) return peak(format, products, scratch);
  configure(scratch, kTileRows);
  for (int64_t n = 0; n < products; n += 4 * kTileRows * kTileRows * kStepWords) {
    if (format == KVIK_BF16) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
}

// The products of attention_prefill.hpp, 32 rows at a time. Rows beyond `count` are never read.
struct WideTiles {
  static constexpr int kRows = kRowsAtOnce;
  static bool take(int words) { return words % kStepWords == 0; }
  static Tiling tiling(int rows) { return Tiling::whole(rows, kRows); }
  static void begin(Scratch& scratch) { configure(scratch, kTileRows); }

  static void pack(const uint32_t* rows, int count, int words, uint32_t* out) {
    for (int m = 0; m < count; ++m) {
      uint32_t* row = out + (int64_t{m / kTileRows} * words + m % kTileRows) * kTileRows;
      for (int k = 0; k < words; k += kStepWords, row += kTileRows * kStepWords) storew(row, loadw(rows + m * words + k));
    }
  }

  template <class Cache>
  static void score(int count, const uint32_t* queries, const uint32_t* keys, int words, float* scores) {
    Rows a{queries, 64, 64 * kTileRows, int64_t{words} * kTileRows * 4};
    multiply_rows<false>(count, false, a, (const uint8_t*)keys, words / kStepWords, false, {scores, kKeyTile * 4});
  }

  template <class Cache>
  static void weigh(int count, typename Cache::Value* weights, const uint32_t* values, int words, float* acc, int dims) {
    opaque(weights);  // the loads of tiles do not say that they read memory
    Rows a{weights, kKeyTile * 2, 64, kTileRows * kKeyTile * 2};
    multiply_rows<false>(count, false, a, (const uint8_t*)values, words / kStepWords, true, {acc, dims * 4});
  }
};
