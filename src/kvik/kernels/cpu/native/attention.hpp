// Attention over the paged cache, shared parts and decode. Included per instruction set. One item is one key/value head
// of one sequence with
//   decode    one query of each head of the group, against one chunk of the context (chunks are merged by the last one)
//   prefill   a tile of queries of each head of the group, against all keys they see (attention_prefill.hpp)
//
//     cache     [block][kv head][offset][head_dim]; 16 consecutive tokens lie in one block, side by side: a run
//     decode    scores [head][token] of the chunk -> weights, rounded as the cache is -> sum of weighted values
//
// Weights are powers of two: exp(scale * s) = 2^(slope * s) with slope = scale / ln 2.

constexpr int kRun = 16;
constexpr float kHidden = -1e30f;  // the score of what must not be seen
constexpr float kSlope = 1.44269504088896341f;

struct Bf16Cache {
  using Dot = Bf16Dot;
  using Value = uint16_t;
  static constexpr int kPerWord = 2;
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
  static constexpr int kPerWord = 1;
  static inline void store(Value* out, F x) { storef(out, x); }
  static inline void load_values(const Value* row, int, bool, int n, I* out) {
    for (int j = 0; j < kVectors; ++j) {
      int left = n - j * kLanes;
      out[j] = left >= kLanes ? loadw(row + j * kLanes) : left > 0 ? loadw_first(row + j * kLanes, left) : seti(0);
    }
  }
};

struct Add {
  inline F operator()(F a, F b) const { return add(a, b); }
};
struct Max {
  inline F operator()(F a, F b) const { return maxf(a, b); }
};

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

// Where the tokens of one sequence lie, for one key/value head.
template <class Cache>
struct Context {
  using Value = typename Cache::Value;
  const KvikOp& op;
  const int32_t* table;
  int head;
  int64_t offset(int token) const {
    int64_t block = table[token / op.block_size];
    return ((block * op.num_kv_heads + head) * op.block_size + token % op.block_size) * op.head_dim;
  }
  const Value* key(int token) const { return (const Value*)op.k_cache + offset(token); }
  const Value* value(int token) const { return (const Value*)op.v_cache + offset(token); }
};

constexpr int kAhead = 4 * kRun;  // tokens between what is computed and what is fetched from memory

template <class Value>
static inline void prefetch_row(const Value* row, int d) {
  for (int i = 0; i < d; i += 64 / int(sizeof(Value))) __builtin_prefetch(row + i, 0, 3);
}

// scores[g][t] = q[g] . key t of a run, for `count` <= kLanes tokens, kHidden beyond; `next` is fetched meanwhile. A row
// of q or keys is Vecs vectors, or `words` words if Vecs is 0.
template <class Cache, int Heads, int Vecs>
static void score_run(const uint32_t* q, const uint32_t* keys, int words, int count, const typename Cache::Value* next,
                      float* scores, int stride) {
  alignas(64) float parts[Heads][kLanes * kLanes];
  I query[Heads][Vecs ? Vecs : 1];
  for (int g = 0; g < Heads; ++g)
    for (int k = 0; k < Vecs; ++k) query[g][k] = loadw(q + g * words + k * kLanes);
  for (int t = 0; t < kLanes; ++t, keys += words) {
    F acc[Heads];
    for (int g = 0; g < Heads; ++g) acc[g] = setf(0);
    if (next) prefetch_row(next + t * words * Cache::kPerWord, words * Cache::kPerWord);
    if (t < count) {
      for (int k = 0; k < Vecs; ++k) {
        I key = loadw(keys + k * kLanes);
        for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, query[g][k]);
      }
      for (int k = Vecs * kLanes; k < words; k += kLanes) {
        int n = min_int(kLanes, words - k);
        I key = loadw_first(keys + k, n);
        for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, loadw_first(q + g * words + k, n));
      }
    }
    for (int g = 0; g < Heads; ++g) storef(&parts[g][t * kLanes], acc[g]);
  }
  for (int g = 0; g < Heads; ++g) {
    float* out = scores + g * stride;
    storef(out, reduce_rows(parts[g], Add()));
    for (int t = count; t < kLanes; ++t) out[t] = kHidden;
  }
}

template <class Cache, int Heads>
static inline void score_heads(const uint32_t* q, const uint32_t* keys, int words, int count,
                               const typename Cache::Value* next, float* scores, int stride) {
  if (words == 4 * kLanes) score_run<Cache, Heads, 4>(q, keys, words, count, next, scores, stride);
  else if (words == 2 * kLanes) score_run<Cache, Heads, 2>(q, keys, words, count, next, scores, stride);
  else score_run<Cache, Heads, 0>(q, keys, words, count, next, scores, stride);
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

// acc[g][panel * 32 ...] = sum over tokens [base, end) of weights[g][t] * value t, for Heads heads and Panels panels
template <class Cache, int Heads, int Panels>
static void weigh_values(const Context<Cache>& context, const typename Cache::Value* weights, int stride, int base, int end,
                         int first_panel, float* acc, int dims) {
  using Value = typename Cache::Value;
  int d = context.op.head_dim, from = first_panel * kPanel;
  F sums[Heads][Panels * kVectors];
  for (int g = 0; g < Heads; ++g)
    for (int j = 0; j < Panels * kVectors; ++j) sums[g][j] = setf(0);
  for (int run = base; run < end; run += kRun) {
    const Value* row = context.value(run) + from;
    const Value* next = run + kAhead < end ? context.value(run + kAhead) + from : row;
    int last = min_int(end, run + kRun);
    for (int t = run; t < last; t += Cache::kPerWord, row += d * Cache::kPerWord, next += d * Cache::kPerWord) {
      for (int i = 0; i < Cache::kPerWord; ++i) prefetch_row(next + i * d, Panels * kPanel);
      I values[Panels * kVectors];
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p)
        Cache::load_values(row + p * kPanel, d, t + 1 < last, min_int(kPanel, d - from - p * kPanel), values + p * kVectors);
#pragma GCC unroll 8
      for (int g = 0; g < Heads; ++g) {
        I weight = bcastw((const uint32_t*)(weights + g * stride + (t - base)));
#pragma GCC unroll 16
        for (int j = 0; j < Panels * kVectors; ++j) sums[g][j] = Cache::Dot::dot(sums[g][j], weight, values[j]);
      }
    }
  }
  for (int g = 0; g < Heads; ++g)
    for (int j = 0; j < Panels * kVectors; ++j) storef(acc + g * dims + from + j * kLanes, sums[g][j]);
}

template <class Cache, int Panels>
static inline void weigh_panels(const Context<Cache>& context, const typename Cache::Value* weights, int stride, int group,
                                int base, int end, int first_panel, float* acc, int dims) {
  constexpr int kMost = kAccumulators / (Panels * kVectors), kHeads = kMost < 1 ? 1 : kMost > 4 ? 4 : kMost;
  for (int g = 0; g < group;) {
    int now = min_int(kHeads, group - g);
    const typename Cache::Value* w = weights + g * stride;
    float* out = acc + g * dims;
    if (now == kHeads) weigh_values<Cache, kHeads, Panels>(context, w, stride, base, end, first_panel, out, dims);
    else if (now >= 2) now = 2, weigh_values<Cache, 2, Panels>(context, w, stride, base, end, first_panel, out, dims);
    else weigh_values<Cache, 1, Panels>(context, w, stride, base, end, first_panel, out, dims);
    g += now;
  }
}

// As many panels at a time as the registers hold with one head; returns how many.
template <class Cache>
static inline int weigh_some(const Context<Cache>& context, const typename Cache::Value* weights, int stride, int group,
                             int base, int end, int first, int left, float* acc, int dims) {
  if constexpr (kAccumulators >= 4 * kVectors) {
    if (left >= 4) return weigh_panels<Cache, 4>(context, weights, stride, group, base, end, first, acc, dims), 4;
    if (left >= 2) return weigh_panels<Cache, 2>(context, weights, stride, group, base, end, first, acc, dims), 2;
  }
  return weigh_panels<Cache, 1>(context, weights, stride, group, base, end, first, acc, dims), 1;
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

template <class Cache>
static void attend_chunk(const Job& job, int s, int part, int head, Scratch& scratch) {
  using Value = typename Cache::Value;
  const KvikOp& op = *job.op;
  const KvikStep& step = *job.step;
  const SequencePlan& plan = job.sequences[s];
  int d = op.head_dim, words = d / Cache::kPerWord, group = op.num_heads / op.num_kv_heads;
  int len = step.seq_lens[s], token = step.query_starts[s], low = op.window > 0 ? max_int(0, len - op.window) : 0;
  int begin = max_int(low, (plan.first_part + part) * plan.chunk);
  int end = min_int(len, (plan.first_part + part + 1) * plan.chunk), base = begin / kRun * kRun;
  int padded = (end - base + kRun - 1) / kRun * kRun, panels = (d + kPanel - 1) / kPanel, dims = panels * kPanel;
  Context<Cache> context{op, step.block_tables + int64_t{s} * step.table_stride, head};
  const uint32_t* q = (const uint32_t*)((const Value*)op.x + (int64_t{token} * op.num_heads + head * group) * d);

  // scores [group][padded] | weights [group][padded] | acc [group][dims]
  float* scores = (float*)scratch.get(sizeof(float) * size_t(2 * group * padded + group * dims + 64));
  Value* weights = (Value*)(scores + group * padded);
  float* acc = scores + 2 * group * padded;
  for (int run = base; run < end; run += kRun) {
    const uint32_t* keys = (const uint32_t*)context.key(run);
    const Value* next = run + kAhead < end ? context.key(run + kAhead) : context.value(min_int(base + run + kAhead - end, end - 1) / kRun * kRun);
    for (int t = 0; t < kRun; t += kLanes, keys += kLanes * words, next += kLanes * d) {
      int count = max_int(0, min_int(kLanes, end - run - t));
      float* out = scores + run + t - base;
      for (int g = 0, left; g < group; g += left >= 4 ? 4 : left >= 2 ? 2 : 1) {
        left = group - g;
        const Value* fetch = g == 0 ? next : nullptr;
        if (left >= 4) score_heads<Cache, 4>(q + g * words, keys, words, count, fetch, out + g * padded, padded);
        else if (left >= 2) score_heads<Cache, 2>(q + g * words, keys, words, count, fetch, out + g * padded, padded);
        else score_heads<Cache, 1>(q + g * words, keys, words, count, fetch, out + g * padded, padded);
      }
    }
  }
  bool only = plan.parts == 1;
  int64_t stride = int64_t{group} * (d + 2);
  float* partials = job.partials + plan.partial + int64_t{head} * plan.parts * stride;
  float* partial = partials + part * stride;
  float tops[1024], totals[1024];
  for (int g = 0; g < group; ++g) {
    float* row = scores + g * padded;
    for (int t = base; t < begin; ++t) row[t - base] = kHidden;
    tops[g] = row_max(row, padded);
    totals[g] = sum(exponentials<Cache>(row, padded, setf(tops[g]), setf(op.scale * kSlope), weights + g * padded));
  }
  for (int p = 0; p < panels;) p += weigh_some<Cache>(context, weights, padded, group, base, end, p, panels - p, acc, dims);
  float* out = (float*)op.y + (int64_t{token} * op.num_heads + head * group) * d;
  for (int g = 0; g < group; ++g) {
    if (only) {
      divide_row(acc + g * dims, totals[g], d, out + g * d);
    } else {
      partial[g] = tops[g], partial[group + g] = totals[g];
      for (int i = 0; i < d; ++i) partial[2 * group + g * d + i] = acc[g * dims + i];
    }
  }
  if (only) return;
  std::atomic<int>& arrivals = job.arrivals[s * op.num_kv_heads + head];
  if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < plan.parts) return;
  arrivals.store(0, std::memory_order_relaxed);
  merge_chunks(op, partials, stride, plan.parts, group, acc, out);
}
