// Attention over the paged cache. Included per instruction set. One item is one key/value head of one sequence with
//   decode    one query of each head of the group, against one chunk of the context (chunks are merged by the last one)
//   prefill   a tile of queries of each head of the group, against all keys they see, kKeyTile at a time
//
//     cache     [block][kv head][offset][head_dim]; 16 consecutive tokens lie in one block, side by side
//     scores    prefill: a packed tile of queries times keys transposed into panels   | word | 32 keys |
//     result    weights times values paired along the tokens, in panels               | pair of tokens | 32 outputs |

struct Bf16Cache {
  using Dot = Bf16Dot;
  using Value = uint16_t;
  static constexpr int kPerWord = 2;
};
struct Fp32Cache {
  using Dot = Fp32Dot;
  using Value = float;
  static constexpr int kPerWord = 1;
};

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

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

// Values of tokens [begin, end) as panels [output / 32][token pair or token][32]; `words` words, zeros past the end.
template <class Cache>
static void pack_values(const Context<Cache>& context, int begin, int end, int words, uint32_t* out) {
  using Value = typename Cache::Value;
  int d = context.op.head_dim, panels = (d + kPanel - 1) / kPanel;
  alignas(64) static const uint16_t zeros[kPanel] = {};
  for (int k = 0; k < words; ++k) {
    int token = begin + k * Cache::kPerWord;
    const Value* row = token < end ? context.value(token) : nullptr;
    for (int p = 0; p < panels; ++p) {
      uint32_t* words_out = out + (int64_t{p} * words + k) * kPanel;
      int n = min_int(kPanel, d - p * kPanel);
      if constexpr (Cache::kPerWord == 2) {
        const uint16_t* first = row ? row + p * kPanel : zeros;
        zip16(first, token + 1 < end ? row + d + p * kPanel : zeros, n, words_out);
      } else {
        for (int i = 0; i < kPanel; ++i) ((float*)words_out)[i] = row && i < n ? row[p * kPanel + i] : 0.0f;
      }
    }
  }
}

// Weights as packed words: pairs of bf16, or fp32 as they are.
template <class Cache>
static inline void store_weights(typename Cache::Value* out, F x) {
  if constexpr (Cache::kPerWord == 2) store_bf16(out, x);
  else storef(out, x);
}

// scores[g][t] = scale * q[g] . key(begin + t) for `count` <= kLanes tokens of one run of 16; -inf from there on
template <class Cache, int Heads>
static void score_run(const uint32_t* q, const uint32_t* keys, int words, int count, float scale, float* scores, int stride) {
  alignas(64) float parts[Heads][kLanes * kLanes];
  for (int t = 0; t < count; ++t, keys += words) {
    F acc[Heads];
    for (int g = 0; g < Heads; ++g) acc[g] = setf(0);
    int k = 0;
    for (; k + kLanes <= words; k += kLanes) {
      I key = loadw(keys + k);
      for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, loadw(q + g * words + k));
    }
    if (k < words) {
      I key = loadw_first(keys + k, words - k);
      for (int g = 0; g < Heads; ++g) acc[g] = Cache::Dot::dot(acc[g], key, loadw_first(q + g * words + k, words - k));
    }
    for (int g = 0; g < Heads; ++g) storef(&parts[g][t * kLanes], acc[g]);
  }
  for (int g = 0; g < Heads; ++g) {
    for (int t = count; t < kLanes; ++t) storef(&parts[g][t * kLanes], setf(0));
    float* out = scores + g * stride;
    storef(out, mul(row_sums(parts[g]), setf(scale)));
    for (int t = count; t < kLanes; ++t) out[t] = -__builtin_inff();
  }
}

// Softmax numerators of one row of scores as weights; returns their sum. n: multiple of 16. A hidden key gets 1e-38.
template <class Cache>
static float exponentials(const float* scores, int n, float top, typename Cache::Value* weights) {
  F total = setf(0), shift = setf(top);
  for (int i = 0; i < n; i += kLanes) {
    F e = exp_f(sub(loadf(scores + i), shift));
    total = add(total, e);
    store_weights<Cache>(weights + i, e);
  }
  return sum(total);
}

static inline float row_max(const float* x, int n) {
  F top = setf(-__builtin_inff());
  for (int i = 0; i < n; i += kLanes) top = maxf(top, loadf(x + i));
  return largest(top);
}

// out[0, n) = acc[0, n) / total
static inline void divide_row(const float* acc, float total, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) storef(out + i, divide(loadf(acc + i), setf(total)));
  for (; i < n; ++i) out[i] = acc[i] / total;
}

// The partial results of a sequence's chunks, in order, into the output row of each head of the group.
//     partial of a chunk    | top [group] | total [group] | acc [group][head_dim] |
static void merge_chunks(const KvikOp& op, const float* partials, int64_t stride, int parts, int group, float* acc, float* out) {
  int d = op.head_dim;
  for (int g = 0; g < group; ++g) {
    float top = -__builtin_inff(), total = 0;
    for (int p = 0; p < parts; ++p) top = partials[p * stride + g] > top ? partials[p * stride + g] : top;
    for (int i = 0; i < d; ++i) acc[i] = 0;
    for (int p = 0; p < parts; ++p) {
      const float* part = partials + p * stride;
      float lanes[kLanes];
      storef(lanes, exp_f(setf(part[g] - top)));
      total += lanes[0] * part[group + g];
      const float* row = part + 2 * group + g * d;
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
  int len = step.seq_lens[s], token = step.query_starts[s];
  int low = op.window > 0 ? max_int(0, len - op.window) : 0;
  int begin = max_int(low, (plan.first_part + part) * plan.chunk);
  int end = min_int(len, (plan.first_part + part + 1) * plan.chunk), base = begin / 16 * 16;
  int padded = (end - base + 15) / 16 * 16, panels = (d + kPanel - 1) / kPanel, pairs = padded / Cache::kPerWord;
  Context<Cache> context{op, step.block_tables + int64_t{s} * step.table_stride, head};
  const uint32_t* q = (const uint32_t*)((const Value*)op.x + (int64_t{token} * op.num_heads + head * group) * d);

  // scores [group][padded] | weights [group][padded] | panels of values | acc [group][panels * 32]
  int dims = panels * kPanel;
  float* scores = (float*)scratch.get(sizeof(float) * (2 * group * padded + dims * pairs + group * dims + 64));
  Value* weights = (Value*)(scores + group * padded);
  uint32_t* values = (uint32_t*)(scores + 2 * group * padded);
  float* acc = (float*)(values + int64_t{dims} * pairs);
  for (int t = base; t < base + padded; t += kLanes) {
    const uint32_t* keys = t < end ? (const uint32_t*)context.key(t) : nullptr;
    int count = max_int(0, min_int(kLanes, end - t));
    for (int g = 0; g < group;) {
      int left = group - g;
      float* out = scores + g * padded + t - base;
      if (left >= 4) score_run<Cache, 4>(q + g * words, keys, words, count, op.scale, out, padded), g += 4;
      else if (left >= 2) score_run<Cache, 2>(q + g * words, keys, words, count, op.scale, out, padded), g += 2;
      else score_run<Cache, 1>(q + g * words, keys, words, count, op.scale, out, padded), g += 1;
    }
  }
  pack_values(context, base, end, pairs, values);
  bool only = plan.parts == 1;
  int64_t stride = int64_t{group} * (d + 2);
  float* partials = job.partials + plan.partial + int64_t{head} * plan.parts * stride;
  float* partial = partials + part * stride;
  float tops[1024], totals[1024];
  for (int g = 0; g < group; ++g) {
    float* row = scores + g * padded;
    for (int t = base; t < begin; ++t) row[t - base] = -__builtin_inff();
    tops[g] = row_max(row, padded);
    totals[g] = exponentials<Cache>(row, padded, tops[g], weights + g * padded);
  }
  for (int g = 0; g < group; g += kMaxTile) {
    int rows = min_int(kMaxTile, group - g);
    uint32_t* tile = (uint32_t*)scores;  // the scores are used up
    interleave((const uint32_t*)weights + g * pairs, pairs, rows, pairs, tile);
    for (int p = 0; p < panels; ++p)
      gemm<typename Cache::Dot, 1, false>(rows, tile, rows, (const uint8_t*)(values + int64_t{p} * pairs * kPanel), pairs,
                                          acc + g * dims + p * kPanel, dims);
  }
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
