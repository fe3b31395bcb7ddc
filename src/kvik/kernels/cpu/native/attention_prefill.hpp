// Prefill attention: a tile of queries against all the keys that they see, with the softmax renormalised as it goes
// (FlashAttention, https://arxiv.org/abs/2205.14135). Included per instruction set, after attention.hpp.
//
//     row r of the item    query r / group, head r % group: neighbours in a tile of 12 see nearly the same keys
//     one key tile         scores [12][128] -> weights [12][128] -> acc [12][head_dim], in the first-level cache, while
//                          the packed keys and values stream from the second

// `count` keys rounded up to whole panels, but not past the end of a tile: keys beyond are not multiplied at all.
static inline int whole_panels(int count) { return min_int(kKeyTile, (count + kPanel - 1) / kPanel * kPanel); }

// Keys of tokens [begin, end) of a tile as panels [token / 32][word][32], zeros past the end.
template <class Cache>
static void pack_keys(const Context<Cache>& context, int head, int begin, int end, int words, uint32_t* out) {
  int shown = whole_panels(end - begin);
  for (int t = 0; t < shown; t += kLanes) {
    uint32_t* panel = out + int64_t{t / kPanel} * words * kPanel + t % kPanel;
    int rows = max_int(0, min_int(kLanes, end - begin - t));
    if (rows == 0) {
      for (int k = 0; k < words; ++k)
        for (int i = 0; i < kLanes; ++i) panel[k * kPanel + i] = 0;
      continue;
    }
    typename Cache::Value space[kLanes * kMaxHeadDim + kLanes];
    int d = context.op.head_dim;
    const void* keys = Cache::rows(context.key(begin + t, head), context.key_scales(begin + t, head), rows, d, space);
    for (int k = 0; k < words; k += kLanes) {
      transpose((const uint32_t*)keys + k, words, panel + k * kPanel, kPanel, rows, min_int(kLanes, words - k));
      for (int i = rows; i < kLanes; ++i)
        for (int j = k; j < min_int(words, k + kLanes); ++j) panel[j * kPanel + i] = 0;
    }
  }
}

// Values of tokens [begin, end) of a tile as panels [output / 32][token pair or token][32], zeros past the end.
template <class Cache>
static void pack_values(const Context<Cache>& context, int head, int begin, int end, uint32_t* out) {
  constexpr int words = kKeyTile / Cache::kPerWord;
  int d = context.op.head_dim, panels = (d + kPanel - 1) / kPanel, shown = whole_panels(end - begin) / Cache::kPerWord;
  for (int k = 0; k < shown; ++k) {
    int token = begin + k * Cache::kPerWord;
    typename Cache::Value space[Cache::kPerWord * kMaxHeadDim + kLanes];
    const typename Cache::Value* row = nullptr;
    if (token < end)
      row = Cache::rows(context.value(token, head), context.value_scales(token, head), min_int(Cache::kPerWord, end - token), d,
                        space);
    for (int p = 0; p < panels; ++p) {
      I values[kVectors];
      for (int j = 0; j < kVectors; ++j) values[j] = seti(0);
      if (row) Cache::load_values(row + p * kPanel, d, token + 1 < end, min_int(kPanel, d - p * kPanel), values);
      for (int j = 0; j < kVectors; ++j) storew(out + (int64_t{p} * words + k) * kPanel + j * kLanes, values[j]);
    }
  }
}

// How rows of queries, and of weights, are multiplied: a tile at a time, at most kRows of them.
struct NarrowTiles {
  static constexpr int kRows = kMaxTile;
  static Tiling tiling(int rows) { return Tiling::of(rows, kRows); }
  static void begin(Scratch&) {}

  static void pack(const uint32_t* rows, int count, int words, uint32_t* out) { interleave(rows, words, count, words, out, count); }
  // scores [count][32] of rows kKeyTile apart = tile . panel of keys
  template <class Cache>
  static void score(int count, const uint32_t* queries, const uint32_t* keys, int words, float* scores) {
    gemm<typename Cache::Dot, 1>(count, queries, count, (const uint8_t*)keys, words, scores, kKeyTile, false);
  }
  // acc [count][32] of rows `dims` apart += weights . panel of values
  template <class Cache>
  static void weigh(int count, typename Cache::Value* weights, const uint32_t* values, int words, float* acc, int dims) {
    constexpr int kPairs = kKeyTile / Cache::kPerWord;
    gemm<typename Cache::Dot, kPairs>(count, (const uint32_t*)weights, 1, (const uint8_t*)values, words, acc, dims, true);
  }
};

struct QueryRows {  // the state of an item; arrays have kLanes elements to spare
  int rows, first_position, group, dims;
  float* top;    // [rows]
  float* total;  // [rows]
  float* acc;    // [rows][dims]
  int position(int row) const { return first_position + row / group; }
};

static inline void hide(float* row, int from, int to) {
  for (; from < to && from % kLanes; ++from) row[from] = kHidden;
  for (; from + kLanes <= to; from += kLanes) storef(row + from, setf(kHidden));
  for (; from < to; ++from) row[from] = kHidden;
}

// The largest score so far of `count` rows from `first` on, into `state.top`; what was summed up is rescaled to it.
static inline void raise_tops(const KvikOp& op, QueryRows& state, int first, int count, const float* scores, int keys) {
  for (int m = 0; m < count; m += kLanes) {
    alignas(64) float maxima[kLanes * kLanes], factors[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const float* row = scores + (m + i < count ? m + i : m) * kKeyTile;
      F top = loadf(row);
      for (int j = kLanes; j < keys; j += kLanes) top = maxf(top, loadf(row + j));
      storef(maxima + i * kLanes, top);
    }
    float* tops = state.top + first + m;
    float* totals = state.total + first + m;
    F old = loadf(tops), now = maxf(old, reduce_rows(maxima, Max()));
    int rows = min_int(kLanes, count - m);
    storef(factors, exp2_f(mul(sub(old, now), setf(op.scale * kSlope))));
    alignas(64) float raised[kLanes];
    storef(raised, now);
    for (int i = 0; i < rows; ++i) {
      if (raised[i] == tops[i]) continue;
      tops[i] = raised[i];
      totals[i] *= factors[i];
      float* acc = state.acc + int64_t{first + m + i} * state.dims;
      for (int j = 0; j < state.dims; j += kLanes) storef(acc + j, mul(loadf(acc + j), setf(factors[i])));
    }
  }
}

// One tile of `count` rows from `first` on against the packed keys and values of a tile, as far as a row sees them.
template <class Cache, class Tiles>
static void attend_tile(const KvikOp& op, QueryRows& state, int first, int count, const uint32_t* queries, int begin,
                        const uint32_t* keys, const uint32_t* values) {
  using Value = typename Cache::Value;
  constexpr int kPairs = kKeyTile / Cache::kPerWord;
  int words = op.head_dim / Cache::kPerWord, shown = whole_panels(state.position(first + count - 1) + 1 - begin);
  alignas(64) float scores[Tiles::kRows * kKeyTile];
  alignas(64) Value weights[Tiles::kRows * kKeyTile];
  alignas(64) float columns[kLanes * kLanes], sums[kLanes];
  for (int p = 0; p < shown / kPanel; ++p)
    Tiles::template score<Cache>(count, queries, keys + int64_t{p} * words * kPanel, words, scores + p * kPanel);
  for (int m = 0; m < count; ++m) {
    int position = state.position(first + m);
    hide(scores + m * kKeyTile, max_int(0, position + 1 - begin), shown);
    if (op.window > 0) hide(scores + m * kKeyTile, 0, min_int(shown, position - op.window + 1 - begin));
  }
  raise_tops(op, state, first, count, scores, shown);
  for (int m = 0; m < count; ++m) {
    int row = first + m, lane = m % kLanes;
    F columns_sum = exponentials<Cache>(scores + m * kKeyTile, shown, setf(state.top[row]), setf(op.scale * kSlope),
                                        weights + m * kKeyTile);
    storef(columns + lane * kLanes, columns_sum);
    if (lane < kLanes - 1 && m < count - 1) continue;
    storef(sums, reduce_rows(columns, Add()));
    for (int i = 0; i <= lane; ++i) state.total[row - lane + i] += sums[i];
  }
  for (int p = 0; p < state.dims / kPanel; ++p)
    Tiles::template weigh<Cache>(count, weights, values + int64_t{p} * kPairs * kPanel, shown / Cache::kPerWord,
                                 state.acc + int64_t{first} * state.dims + p * kPanel, state.dims);
}

template <class Cache, class Tiles>
static void attend_queries(const Job& job, int s, int part, int head, Scratch& scratch) {
  using Value = typename Cache::Value;
  constexpr int kPairs = kKeyTile / Cache::kPerWord;
  const KvikOp& op = *job.op;
  const KvikStep& step = *job.step;
  const SequencePlan& plan = job.sequences[s];
  int d = op.head_dim, words = d / Cache::kPerWord, group = op.num_heads / op.num_kv_heads;
  int num_queries = step.query_starts[s + 1] - step.query_starts[s];
  int first = part * plan.chunk, count = min_int(plan.chunk, num_queries - first);
  int token = step.query_starts[s] + first, position = step.seq_lens[s] - num_queries + first;
  if (count <= 0) return;
  Context<Cache> context{op, step.block_tables + int64_t{s} * step.table_stride};
  QueryRows state{count * group, position, group, (d + kPanel - 1) / kPanel * kPanel, nullptr, nullptr, nullptr};
  Tiling tiling = Tiles::tiling(state.rows);
  size_t rows_held = size_t(tiling.tiles) * Tiles::kRows;
  Tiles::begin(scratch);

  // keys | values | acc | queries packed by tile | top | total, each a multiple of 64 bytes
  size_t keys_size = size_t(kKeyTile) * words, values_size = size_t(kPairs) * state.dims;
  size_t acc_size = rows_held * state.dims, queries_size = (rows_held * words + 15) / 16 * 16;
  uint32_t* keys = (uint32_t*)scratch.get(4 * (keys_size + values_size + acc_size + queries_size + 2 * size_t(state.rows + kLanes)));
  uint32_t* values = keys + keys_size;
  state.acc = (float*)(values + values_size);
  uint32_t* queries = (uint32_t*)(state.acc + acc_size);
  state.top = (float*)(queries + queries_size);
  state.total = state.top + state.rows + kLanes;
  for (size_t i = 0; i < acc_size; i += kLanes) storef(state.acc + i, setf(0));
  for (int r = 0; r < state.rows + kLanes; ++r) state.top[r] = kHidden, state.total[r] = 0;

  for (int t = 0; t < tiling.tiles; ++t) {
    uint32_t rows[Tiles::kRows * kMaxHeadDim];
    for (int m = 0; m < tiling.size(t); ++m) {
      int r = tiling.start(t) + m;
      const Value* q = (const Value*)op.x + ((int64_t{token} + r / group) * op.num_heads + head * group + r % group) * d;
      __builtin_memcpy(rows + m * words, q, size_t(words) * 4);
    }
    Tiles::pack(rows, tiling.size(t), words, queries + int64_t{tiling.start(t)} * words);
  }
  int low = op.window > 0 ? max_int(0, position - op.window + 1) : 0, end = position + count;
  for (int begin = low / kKeyTile * kKeyTile; begin < end; begin += kKeyTile) {
    pack_keys(context, head, begin, end, words, keys);
    pack_values(context, head, begin, end, values);
    for (int t = 0; t < tiling.tiles; ++t) {
      int row = tiling.start(t), rows = tiling.size(t);
      if (begin > state.position(row + rows - 1)) continue;  // all of it lies in the future
      if (op.window > 0 && begin + kKeyTile <= state.position(row) - op.window + 1) continue;  // or too far back
      attend_tile<Cache, Tiles>(op, state, row, rows, queries + int64_t{row} * words, begin, keys, values);
    }
  }
  for (int r = 0; r < state.rows; ++r) {
    int64_t at = ((int64_t{token} + r / group) * op.num_heads + head * group + r % group) * d;
    divide_row(state.acc + int64_t{r} * state.dims, state.total[r], d, (float*)op.y + at);
  }
}

template <class Cache>
static void attend_prompt(const Job& job, int s, int part, int head, Scratch& scratch) {
#if KVIK_HAS_AMX
  if constexpr (Cache::kPerWord == 2)
    if (WideTiles::take(job.op->head_dim / Cache::kPerWord))
      return attend_queries<Cache, WideTiles>(job, s, part, head, scratch);
#endif
  attend_queries<Cache, NarrowTiles>(job, s, part, head, scratch);
}

static int sequence_of(const Job& job, int item) {  // the last one that starts at or before the item
  int low = 0, high = job.step->num_seqs - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (job.sequences[middle].first_item <= item) low = middle;
    else high = middle - 1;
  }
  return low;
}

static void attention(const Job& job, int item, Scratch& scratch) {
  const KvikOp& op = *job.op;
  int s = sequence_of(job, item);
  const SequencePlan& plan = job.sequences[s];
  int inner = item - plan.first_item, turns = op.num_kv_heads / plan.heads;
  int part = inner / turns, head = inner % turns * plan.heads;
  bool bf16 = op.type == KVIK_BF16;
  if (job.step->query_starts[s + 1] - job.step->query_starts[s] == 1) {
    op.k_scales ? attend_chunk<Int8Cache<Fp32Cache>>(job, s, part, head, scratch)
    : bf16      ? attend_chunk<Bf16Cache>(job, s, part, head, scratch)
                : attend_chunk<Fp32Cache>(job, s, part, head, scratch);
  } else {
    part = plan.parts - 1 - part;  // the longest first
    if (op.k_scales)
      bf16 ? attend_prompt<Int8Cache<Bf16Cache>>(job, s, part, head, scratch)
           : attend_prompt<Int8Cache<Fp32Cache>>(job, s, part, head, scratch);
    else
      bf16 ? attend_prompt<Bf16Cache>(job, s, part, head, scratch) : attend_prompt<Fp32Cache>(job, s, part, head, scratch);
  }
}
