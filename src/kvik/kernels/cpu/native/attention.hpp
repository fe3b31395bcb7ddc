// Attention over the paged cache, shared parts and decode. Included per instruction set. One item is of one sequence
//   decode    one query of each head, some key/value heads, one chunk of the context (the last chunk to end merges all)
//   prefill   a tile of queries of the heads of one group, all keys that they see (attention_prefill.hpp)
//
//     cache     [block][kv head][offset][head_dim]; 16 consecutive tokens lie in one block, side by side: a run.
//               From one block to the next it is `block_rows` rows: other layers lie between them.
//     decode    scores [head][token] of the chunk -> weights, rounded as the cache is -> sum of weighted values
//
// An int8 cache has a scale per token and head, [block][kv head][offset]. Decode widens its values to fp32 in registers
// and scales the scores of keys and the weights of values; prefill packs keys and values that are multiplied out.
//
// Decode goes through a block with all heads of the item before it goes to the next block, which is the order of memory:
// pieces of one head alone are too short for the memory to reach its speed (measured: half of it).
//
// Weights are powers of two: exp(scale * s) = 2^(slope * s) with slope = scale / ln 2.

constexpr int kRun = 16;
constexpr float kHidden = -1e30f;  // the score of what must not be seen
constexpr float kSlope = 1.44269504088896341f;

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

// A kind of cache: `Stored` is what lies in it, `Value` what it is multiplied as (queries and weights too), kPerWord of
// them in a word; `Dot` multiplies words.
struct Bf16Cache {
  using Dot = Bf16Dot;
  using Value = uint16_t;
  using Stored = Value;
  static constexpr int kPerWord = 2;
  static constexpr bool kScaled = false;
  // the first n <= kLanes words at p
  static inline I load_key(const Stored* p, int n) { return n < kLanes ? loadw_first(p, n) : loadw(p); }
  // `count` rows as they are multiplied; `space` is for those that have to be made
  static inline const Value* rows(const Stored* p, const float*, int, int, Value*) { return p; }
  static inline void store(Value* out, F x) { store_bf16(out, x); }
  // words of outputs [0, n) of a token and the next one, or of the token alone where that is not `both`
  static inline void load_values(const Value* row, int d, bool both, int n, I* out) {
    alignas(64) static const Value zeros[kPanel] = {};
    zip16(row, both ? row + d : zeros, n, out);
  }
};
struct Fp32Cache {
  using Dot = Fp32Dot;
  using Value = float;
  using Stored = Value;
  static constexpr int kPerWord = 1;
  static constexpr bool kScaled = false;
  static inline I load_key(const Stored* p, int n) { return n < kLanes ? loadw_first(p, n) : loadw(p); }
  static inline const Value* rows(const Stored* p, const float*, int, int, Value*) { return p; }
  static inline void store(Value* out, F x) { storef(out, x); }
  static inline void load_values(const Value* row, int, bool, int n, I* out) {
    for (int j = 0; j < kVectors; ++j) {
      int left = n - j * kLanes;
      out[j] = left >= kLanes ? loadw(row + j * kLanes) : left > 0 ? loadw_first(row + j * kLanes, left) : seti(0);
    }
  }
};

// Bytes, multiplied as floats when they are scaled later, else scaled first and multiplied as `Float` has it.
template <class Float>
struct Int8Cache : Float {
  using Value = typename Float::Value;
  using Stored = int8_t;
  static constexpr bool kScaled = true;
  using Float::load_values;
  static inline F load_first(const Stored* p, int n) {
    if (n >= kLanes) return load_s8(p);
    Stored bytes[kLanes] = {};
    for (int i = 0; i < n; ++i) bytes[i] = p[i];
    return load_s8(bytes);
  }
  static inline I load_key(const Stored* p, int n) { return as_int(load_first(p, n)); }
  static inline void load_values(const Stored* row, int, bool, int n, I* out) {
    for (int j = 0; j < kVectors; ++j) out[j] = as_int(load_first(row + j * kLanes, n - j * kLanes));
  }
  // `space` has kLanes elements to spare
  static const Value* rows(const Stored* p, const float* scales, int count, int d, Value* space) {
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < d; i += kLanes)
        Float::store(space + r * d + i, mul(load_first(p + r * d + i, d - i), setf(scales[r])));
    return space;
  }
};

// Where the tokens of one sequence lie.
template <class Cache>
struct Context {
  using Stored = typename Cache::Stored;
  const KvikOp& op;
  const int32_t* table;
  int64_t place(int token, int head) const {
    int64_t block = table[token / op.block_size];
    return block * op.block_rows + int64_t{head} * op.block_size + token % op.block_size;
  }
  const Stored* key(int token, int head) const { return (const Stored*)op.k_cache + place(token, head) * op.head_dim; }
  const Stored* value(int token, int head) const { return (const Stored*)op.v_cache + place(token, head) * op.head_dim; }
  const float* key_scales(int token, int head) const { return Cache::kScaled ? op.k_scales + place(token, head) : nullptr; }
  const float* value_scales(int token, int head) const { return Cache::kScaled ? op.v_scales + place(token, head) : nullptr; }
};

constexpr int kAhead = 2 * kRun;  // rows between what is computed and what is fetched from memory

// Which rows to fetch while decode is at (token, head): those kAhead further in the order of memory, which is the next
// block's for the last rows of a block.
template <class Stored>
struct Ahead {
  const Stored* here;  // the item's first head in this block, and in the next one
  const Stored* next;
  int64_t size;  // of the item's heads in a block
  const Stored* row(int64_t at, int d) const {
    at += int64_t{kAhead} * d;
    return at < size ? here + at : next + (at - size) % size;
  }
};

template <class Stored>
static inline void prefetch_row(const Stored* row, int d) {
  for (int i = 0; i < d; i += 64 / int(sizeof(Stored))) prefetch(row + i);
}

template <class Cache>
struct Keys {  // of a run
  const typename Cache::Stored* rows;
  const float* scales;
  int words, count;                    // of a row; tokens, at most kLanes
  const typename Cache::Stored* next;  // to be fetched meanwhile, or null
};

// scores[g][t] = q[g] . key t, kHidden beyond the last one. A row of q or keys is Vecs vectors, or any number if Vecs is 0.
template <class Cache, int Heads, int Vecs>
static void score_run(const uint32_t* q, const Keys<Cache>& keys, float* scores, int stride) {
  int words = keys.words, d = words * Cache::kPerWord, whole = words / kLanes * kLanes;
  const typename Cache::Stored* row = keys.rows;
  alignas(64) float parts[Heads][kLanes * kLanes];
  I query[Heads][Vecs ? Vecs : 1];
  for (int g = 0; g < Heads; ++g)
    for (int k = 0; k < Vecs; ++k) query[g][k] = loadw(q + g * words + k * kLanes);
  for (int t = 0; t < kLanes; ++t, row += d) {
    F acc[Heads];
    for (int g = 0; g < Heads; ++g) acc[g] = setf(0);
    if (keys.next) prefetch_row(keys.next + t * d, d);
    if (t < keys.count) {
      for (int k = 0; k < Vecs; ++k) {
        I key = Cache::load_key(row + k * kLanes * Cache::kPerWord, kLanes);
        for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, query[g][k]);
      }
      for (int k = Vecs * kLanes; k < whole; k += kLanes) {
        I key = Cache::load_key(row + k * Cache::kPerWord, kLanes);
        for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, loadw(q + g * words + k));
      }
      if (int n = words - whole) {
        I key = Cache::load_key(row + whole * Cache::kPerWord, n);
        for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, loadw_first(q + g * words + whole, n));
      }
    }
    for (int g = 0; g < Heads; ++g) storef(&parts[g][t * kLanes], acc[g]);
  }
  for (int g = 0; g < Heads; ++g) {
    float* out = scores + g * stride;
    F sums = reduce_rows(parts[g], Add());
    storef(out, Cache::kScaled ? mul(sums, loadf(keys.scales)) : sums);
    for (int t = keys.count; t < kLanes; ++t) out[t] = kHidden;
  }
}

// The first `heads` <= Heads rows of q; returns how many were done.
template <class Cache, int Heads, int Vecs>
static inline int score_heads(int heads, const uint32_t* q, const Keys<Cache>& keys, float* scores, int stride) {
  if constexpr (Heads > 1)
    if (heads < Heads) return score_heads<Cache, Heads - 1, Vecs>(heads, q, keys, scores, stride);
  score_run<Cache, Heads, Vecs>(q, keys, scores, stride);
  return Heads;
}

// All rows of q of a group, as many at a time as the registers hold.
template <class Cache>
static inline void score_group(int group, const uint32_t* q, Keys<Cache> keys, float* scores, int stride) {
  int words = keys.words;
  for (int g = 0, done; g < group; g += done, q += done * words, scores += done * stride, keys.next = nullptr) {
    if (words == 8 * kLanes) done = score_heads<Cache, 4, 8>(group - g, q, keys, scores, stride);
    else if (words == 4 * kLanes) done = score_heads<Cache, 4, 4>(group - g, q, keys, scores, stride);
    else if (words == 2 * kLanes) done = score_heads<Cache, 8, 2>(group - g, q, keys, scores, stride);
    else done = score_heads<Cache, 4, 0>(group - g, q, keys, scores, stride);
  }
}

static inline float row_max(const float* x, int n) {
  F top = setf(kHidden);
  for (int i = 0; i < n; i += kLanes) top = maxf(top, loadf(x + i));
  return largest(top);
}

// weights = 2^(slope (scores - top)); returns the sum over the lanes' columns. n is a multiple of kLanes.
template <class Cache>
static inline F exponentials(const float* scores, int n, F top, F slope, typename Cache::Value* weights) {
  F total = setf(0);
  for (int i = 0; i < n; i += kLanes) {
    F e = exp2_f(mul(sub(loadf(scores + i), top), slope));
    total = add(total, e);
    Cache::store(weights + i, e);
  }
  return total;
}

// out[0, n) = acc[0, n) / total
static inline void divide_row(const float* acc, float total, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) storef(out + i, divide(loadf(acc + i), setf(total)));
  for (; i < n; ++i) out[i] = acc[i] / total;
}

// acc[g][first * 32 ...] += sum over `count` rows of values of weights[g][t] * row t, for Heads heads and Panels panels,
// of which a single one may reach beyond the row
template <class Cache, int Heads, int Panels>
static void weigh_values(const typename Cache::Stored* row, int d, int count, const typename Cache::Stored* next,
                         const typename Cache::Value* weights, int stride, int first, float* acc, int dims) {
  int from = first * kPanel;
  F sums[Heads][Panels * kVectors];
#pragma GCC unroll 4
  for (int g = 0; g < Heads; ++g)
#pragma GCC unroll 16
    for (int j = 0; j < Panels * kVectors; ++j) sums[g][j] = loadf(acc + g * dims + from + j * kLanes);
  row += from;
  for (int t = 0; t < count; t += Cache::kPerWord, row += d * Cache::kPerWord) {
    if (next)
      for (int i = 0; i < Cache::kPerWord; ++i, next += d) prefetch_row(next, d);
    I values[Panels * kVectors];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      Cache::load_values(row + p * kPanel, d, t + 1 < count, Panels > 1 ? kPanel : min_int(kPanel, d - from), values + p * kVectors);
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
      I weight = bcastw((const uint32_t*)(weights + g * stride + t));
#pragma GCC unroll 16
      for (int j = 0; j < Panels * kVectors; ++j) sums[g][j] = Cache::Dot::dot(sums[g][j], weight, values[j]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < Heads; ++g)
#pragma GCC unroll 16
    for (int j = 0; j < Panels * kVectors; ++j) storef(acc + g * dims + from + j * kLanes, sums[g][j]);
}

// The first `heads` <= Heads rows of weights; returns how many were done.
template <class Cache, int Heads, int Panels>
static inline int weigh_heads(int heads, const typename Cache::Stored* row, int d, int count, const typename Cache::Stored* next,
                              const typename Cache::Value* weights, int stride, int first, float* acc, int dims) {
  if constexpr (Heads > 1)
    if (heads < Heads)
      return weigh_heads<Cache, Heads - 1, Panels>(heads, row, d, count, next, weights, stride, first, acc, dims);
  weigh_values<Cache, Heads, Panels>(row, d, count, next, weights, stride, first, acc, dims);
  return Heads;
}

template <class Cache, int Panels>
static inline void weigh_panels(const typename Cache::Stored* row, int d, int count, const typename Cache::Stored* next,
                                const typename Cache::Value* weights, int stride, int group, int first, float* acc, int dims) {
  constexpr int kMost = kAccumulators / (Panels * kVectors), kHeads = kMost < 1 ? 1 : kMost > 6 ? 6 : kMost;
  for (int g = 0; g < group; next = nullptr) {
    int left = group - g, now = left > kHeads && left < 2 * kHeads ? (left + 1) / 2 : left;  // 7 heads are 4 and 3
    g += weigh_heads<Cache, kHeads, Panels>(now, row, d, count, next, weights + g * stride, stride, first, acc + g * dims, dims);
  }
}

// All panels of a run of values, as many at a time as the registers hold with one head.
template <class Cache>
static void weigh_run(const typename Cache::Stored* row, int d, int count, const typename Cache::Stored* next,
                      const typename Cache::Value* weights, int stride, int group, float* acc, int dims) {
  int panels = dims / kPanel, whole = d / kPanel;
  for (int p = 0; p < panels; next = nullptr) {
    if constexpr (kAccumulators >= 4 * kVectors) {
      if (whole - p >= 4) {
        weigh_panels<Cache, 4>(row, d, count, next, weights, stride, group, p, acc, dims), p += 4;
        continue;
      }
      if (whole - p >= 2) {
        weigh_panels<Cache, 2>(row, d, count, next, weights, stride, group, p, acc, dims), p += 2;
        continue;
      }
    }
    weigh_panels<Cache, 1>(row, d, count, next, weights, stride, group, p, acc, dims), p += 1;
  }
}

// The partial results of a sequence's chunks, in order, into the output row of each head of the group.
//     partial of a chunk    | top [group] | total [group] | acc [group][head_dim] |
static void merge_chunks(const KvikOp& op, const float* partials, int64_t stride, int parts, int group, float* acc, float* out) {
  int d = op.head_dim;
  for (int g = 0; g < group; ++g) {
    float top = kHidden, total = 0;
    for (int p = 0; p < parts; ++p) top = partials[p * stride + g] > top ? partials[p * stride + g] : top;
    for (int i = 0; i < d; ++i) acc[i] = 0;
    for (int p = 0; p < parts; ++p) {
      const float* part = partials + p * stride;
      const float* row = part + 2 * group + g * d;
      float lanes[kLanes];
      storef(lanes, exp2_f(setf((part[g] - top) * op.scale * kSlope)));
      total += lanes[0] * part[group + g];
      for (int i = 0; i < d; ++i) acc[i] += lanes[0] * row[i];
    }
    divide_row(acc, total, d, out + g * d);
  }
}

// A chunk of the context of one sequence: tokens [base, end), of which those before `begin` are outside the window.
struct Chunk {
  int base, begin, end, padded;
};

// scores [heads * group][padded] of the item's heads, block by block
template <class Cache>
static void score_chunk(const Context<Cache>& context, const Chunk& chunk, const uint32_t* q, int head, int heads, float* scores) {
  using Stored = typename Cache::Stored;
  const KvikOp& op = context.op;
  int d = op.head_dim, words = d / Cache::kPerWord, group = op.num_heads / op.num_kv_heads, size = op.block_size;
  for (int first = chunk.base, last; first < chunk.end; first = last) {
    last = min_int(chunk.end, (first / size + 1) * size);
    const Stored* follows = last < chunk.end ? context.key(last, head) : context.value(chunk.base, head);
    Ahead<Stored> ahead{context.key(first / size * size, head), follows, int64_t{heads} * size * d};
    for (int h = 0; h < heads; ++h)
      for (int t = first; t < first + (last - first + kRun - 1) / kRun * kRun; t += kLanes) {
        const Stored* next = ahead.row((int64_t{h} * size + t % size) * d, d);
        int count = max_int(0, min_int(kLanes, last - t));
        Keys<Cache> keys{context.key(t, head + h), context.key_scales(t, head + h), words, count, next};
        score_group<Cache>(group, q + h * group * words, keys, scores + h * group * chunk.padded + t - chunk.base, chunk.padded);
      }
  }
}

static inline void scale_weights(const float* scales, int group, float* weights, int stride) {
  for (int g = 0; g < group; ++g, weights += stride)
    for (int i = 0; i < kRun; i += kLanes) storef(weights + i, mul(loadf(weights + i), loadf(scales + i)));
}

// acc [heads * group][dims] = weights . values; of a scaled cache, the weights are scaled
template <class Cache>
static void weigh_chunk(const Context<Cache>& context, const Chunk& chunk, typename Cache::Value* weights, int head,
                        int heads, float* acc, int dims) {
  using Stored = typename Cache::Stored;
  const KvikOp& op = context.op;
  int d = op.head_dim, group = op.num_heads / op.num_kv_heads, size = op.block_size;
  for (int i = 0; i < heads * group * dims; i += kLanes) storef(acc + i, setf(0));
  for (int first = chunk.base, last; first < chunk.end; first = last) {
    last = min_int(chunk.end, (first / size + 1) * size);
    const Stored* here = context.value(first / size * size, head);
    Ahead<Stored> ahead{here, last < chunk.end ? context.value(last, head) : here, int64_t{heads} * size * d};
    for (int h = 0; h < heads; ++h)
      for (int t = first; t < last; t += kRun) {
        typename Cache::Value* run = weights + h * group * chunk.padded + t - chunk.base;
        if constexpr (Cache::kScaled) scale_weights(context.value_scales(t, head + h), group, run, chunk.padded);
        weigh_run<Cache>(context.value(t, head + h), d, min_int(kRun, last - t),
                         ahead.row((int64_t{h} * size + t % size) * d, d), run, chunk.padded, group, acc + h * group * dims,
                         dims);
      }
  }
}

template <class Cache>
static void attend_chunk(const Job& job, int s, int part, int head, Scratch& scratch) {
  using Value = typename Cache::Value;
  const KvikOp& op = *job.op;
  const KvikStep& step = *job.step;
  const SequencePlan& plan = job.sequences[s];
  int d = op.head_dim, group = op.num_heads / op.num_kv_heads, heads = plan.heads, rows = heads * group;
  int len = step.seq_lens[s], token = step.query_starts[s], low = op.window > 0 ? max_int(0, len - op.window) : 0;
  Chunk chunk;
  chunk.begin = max_int(low, (plan.first_part + part) * plan.chunk);
  chunk.end = min_int(len, (plan.first_part + part + 1) * plan.chunk);
  chunk.base = chunk.begin / kRun * kRun;
  chunk.padded = (chunk.end - chunk.base + kRun - 1) / kRun * kRun;
  int padded = chunk.padded, dims = (d + kPanel - 1) / kPanel * kPanel;
  Context<Cache> context{op, step.block_tables + int64_t{s} * step.table_stride};
  int64_t query = (int64_t{token} * op.num_heads + head * group) * d;

  // scores [rows][padded] | weights [rows][padded] | acc [rows][dims] | tops [rows] | totals [rows] | queries [rows][d]
  float* scores = (float*)scratch.get(sizeof(float) * size_t(rows) * size_t(2 * padded + dims + 2 + d));
  Value* weights = (Value*)(scores + rows * padded);
  float* acc = scores + 2 * rows * padded;
  float* tops = acc + rows * dims;
  float* totals = tops + rows;
  const void* queries = (const Value*)op.x + query;
  if (Cache::kScaled && op.type == KVIK_BF16) {
    convert_row((const uint16_t*)op.x + query, KVIK_BF16, rows * d, totals + rows);
    queries = totals + rows;
  }
  score_chunk(context, chunk, (const uint32_t*)queries, head, heads, scores);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * padded;
    for (int t = chunk.base; t < chunk.begin; ++t) row[t - chunk.base] = kHidden;
    tops[r] = row_max(row, padded);
    totals[r] = sum(exponentials<Cache>(row, padded, setf(tops[r]), setf(op.scale * kSlope), weights + r * padded));
  }
  weigh_chunk(context, chunk, weights, head, heads, acc, dims);
  float* out = (float*)op.y + query;
  if (plan.parts == 1) {
    for (int r = 0; r < rows; ++r) divide_row(acc + r * dims, totals[r], d, out + r * d);
    return;
  }
  int64_t stride = int64_t{group} * (d + 2);
  for (int h = 0; h < heads; ++h) {
    float* partials = job.partials + plan.partial + int64_t{head + h} * plan.parts * stride;
    float* partial = partials + part * stride;
    for (int g = 0; g < group; ++g) {
      int r = h * group + g;
      partial[g] = tops[r], partial[group + g] = totals[r];
      for (int i = 0; i < d; ++i) partial[2 * group + g * d + i] = acc[r * dims + i];
    }
    std::atomic<int>& arrivals = job.arrivals[s * op.num_kv_heads + head + h];
    if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < plan.parts) continue;
    arrivals.store(0, std::memory_order_relaxed);
    merge_chunks(op, partials, stride, plan.parts, group, acc + h * group * dims, out + h * group * d);
  }
}
