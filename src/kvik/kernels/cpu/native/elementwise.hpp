// What is not a matrix product: embedding, norms, rotation with the KV store, argmax. Included per instruction set.

static void convert_row(const void* src, int type, int n, float* out) {
  int i = 0;
  if (type == KVIK_BF16)
    for (; i + kLanes <= n; i += kLanes) storef(out + i, load_bf16((const uint16_t*)src + i));
  else if (type == KVIK_FP16)
    for (; i + kLanes <= n; i += kLanes) storef(out + i, load_f16((const uint16_t*)src + i));
  else
    for (; i + kLanes <= n; i += kLanes) storef(out + i, loadf((const float*)src + i));
  if (i < n) {
    uint16_t narrow[kLanes] = {};
    float wide[kLanes] = {};
    for (int j = i; j < n; ++j) {
      if (type == KVIK_FP32) wide[j - i] = ((const float*)src)[j];
      else narrow[j - i] = ((const uint16_t*)src)[j];
    }
    if (type == KVIK_BF16) storef(wide, load_bf16(narrow));
    if (type == KVIK_FP16) storef(wide, load_f16(narrow));
    for (int j = i; j < n; ++j) out[j] = wide[j - i];
  }
}

// One row of a packed weight as fp32: the embedding of a model whose embedding is its lm_head.
static void unpack_row(const KvikLinear& w, int64_t row, float* out) {
  const uint8_t* panel = w.data + w.panel_bytes * (row / kPanel);
  int lane = int(row % kPanel);
  if (w.format == KVIK_INT4) {
    int record = 64 + 16 * w.group;
    for (int k = 0; k < w.k; ++k) {
      const uint8_t* group = panel + int64_t{k / w.group} * record;
      int inner = k % w.group, word = inner / 4;
      uint8_t byte = group[64 + word / 2 * 128 + lane * 4 + inner % 4];
      uint16_t half[kLanes] = {((const uint16_t*)group)[lane]};
      float scale[kLanes];
      storef(scale, load_f16(half));
      out[k] = float((word & 1 ? byte >> 4 : byte & 15) - 8) * scale[0];
    }
    return;
  }
  for (int k = 0; k < w.k; ++k) {
    if (w.format == KVIK_INT8) {
      out[k] = float(int(panel[(k / 4) * 128 + lane * 4 + k % 4]) - 128) * w.scales[row];
    } else if (w.format == KVIK_BF16) {
      uint32_t bits = uint32_t(((const uint16_t*)panel)[(k / 2) * 64 + lane * 2 + k % 2]) << 16;
      __builtin_memcpy(out + k, &bits, 4);
    } else {
      out[k] = ((const float*)panel)[k * 32 + lane];
    }
  }
}

static void embed(const Job& job, int item, Scratch&) {
  const KvikOp& op = *job.op;
  int64_t id = job.step->input_ids[item];
  float* out = (float*)op.y + item * op.width;
  if (!op.x) return unpack_row(*op.linear, id, out);
  int64_t bytes = op.type == KVIK_FP32 ? 4 : 2;
  convert_row((const uint8_t*)op.x + id * op.width * bytes, op.type, int(op.width), out);
}

static void norm(const Job& job, int item, Scratch&) {
  const KvikOp& op = *job.op;
  int64_t row = op.code == KVIK_GATHER_NORM ? job.step->logit_indices[item] : item;
  normalise((const float*)op.x + row * op.width, op.norm, op.eps, int(op.width), int(op.width), (float*)op.y + item * op.width);
}

static void store_row(const float* x, int n, int type, int64_t at, void* dst) {
  int i = 0;
  if (type == KVIK_FP32) {
    float* out = (float*)dst + at;
    for (; i + kLanes <= n; i += kLanes) storef(out + i, loadf(x + i));
    for (; i < n; ++i) out[i] = x[i];
    return;
  }
  uint16_t* out = (uint16_t*)dst + at;
  for (; i + kLanes <= n; i += kLanes) store_bf16(out + i, loadf(x + i));
  if (i < n) {
    float wide[kLanes] = {};
    uint16_t narrow[kLanes];
    for (int j = i; j < n; ++j) wide[j - i] = x[j];
    store_bf16(narrow, loadf(wide));
    for (int j = i; j < n; ++j) out[j] = narrow[j - i];
  }
}

// out = round(x / scale) with scale = max |x| / 127, which is returned, and is NaN where x is not finite. x has zeros from
// n up to a multiple of kLanes.
static float store_row_int8(const float* x, int n, int8_t* out) {
  F top = setf(0), finite = setf(0);
  for (int i = 0; i < n; i += kLanes) {
    top = maxf(top, absf(loadf(x + i)));
    finite = fma(loadf(x + i), setf(0), finite);
  }
  float most = largest(top);
  F inverse = setf(most > 1e-30f ? 127.0f / most : 0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_s8(out + i, to_int(mul(loadf(x + i), inverse)));
  if (i < n) {
    int8_t last[kLanes];
    store_s8(last, to_int(mul(loadf(x + i), inverse)));
    __builtin_memcpy(out + i, last, size_t(n - i));
  }
  return most / 127.0f + sum(finite);
}

// Pairs (i, i + half) turned by the token's angle: (a cos - b sin, b cos + a sin).
static void rotate(float* x, int half, const float* cosines, const float* sines) {
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    F a = loadf(x + i), b = loadf(x + half + i), c = loadf(cosines + i), s = loadf(sines + i);
    storef(x + i, sub(mul(a, c), mul(b, s)));
    storef(x + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[i] + a * sines[i];
  }
}

// Item: one token. Its heads are read in the order of memory.
static void rope_store(const Job& job, int token, Scratch& scratch) {
  const KvikOp& op = *job.op;
  int d = op.head_dim, half = d / 2;
  const float* qkv = (const float*)op.x + token * op.width;
  const float* cosines = job.step->cos + int64_t{token} * half;
  const float* sines = job.step->sin + int64_t{token} * half;
  int padded = (d + kLanes - 1) / kLanes * kLanes;
  float* row = (float*)scratch.get(sizeof(float) * padded);
  for (int head = 0; head < op.num_heads; ++head, qkv += d) {
    normalise(qkv, op.norm, op.eps, d, d, row);
    rotate(row, half, cosines, sines);
    store_row(row, d, op.type, (int64_t{token} * op.num_heads + head) * d, op.y);
  }
  int64_t slot = job.step->slots[token], heads = op.num_kv_heads;
  int64_t first = slot / op.block_size * op.block_rows + slot % op.block_size;  // place of head 0
  for (int head = 0; head < heads; ++head, qkv += d) {
    int64_t place = first + int64_t{head} * op.block_size;
    normalise(qkv, op.norm2, op.eps, d, padded, row);
    rotate(row, half, cosines, sines);
    if (op.k_scales) op.k_scales[place] = store_row_int8(row, d, (int8_t*)op.k_cache + place * d);
    else store_row(row, d, op.type, place * d, op.k_cache);
  }
  for (int head = 0; head < heads; ++head, qkv += d) {
    int64_t place = first + int64_t{head} * op.block_size;
    if (op.k_scales) {
      normalise(qkv, nullptr, 0, d, padded, row);
      op.v_scales[place] = store_row_int8(row, d, (int8_t*)op.v_cache + place * d);
    } else {
      store_row(qkv, d, op.type, place * d, op.v_cache);
    }
  }
}

static void argmax(const Job& job, int item, Scratch&) {
  const KvikOp& op = *job.op;
  const float* x = (const float*)op.x + item * op.width;
  int64_t n = op.width, whole = n / kLanes * kLanes;
  F top = setf(-__builtin_inff());
  for (int64_t i = 0; i < whole; i += kLanes) top = maxf(top, loadf(x + i));
  float best = largest(top);
  for (int64_t i = whole; i < n; ++i) best = x[i] > best ? x[i] : best;
  int64_t at = 0;
  while (at < n - 1 && x[at] != best) ++at;
  ((int64_t*)op.y)[item] = at;
}

static void read(const void* data, int64_t bytes) {
  const uint8_t* p = (const uint8_t*)data;
  I acc[4] = {seti(0), seti(0), seti(0), seti(0)};
  constexpr int64_t kStep = 16 * kLanes;
  for (int64_t i = 0; i + kStep <= bytes; i += kStep)
    for (int j = 0; j < 4; ++j) acc[j] = addi(acc[j], loadw(p + i + j * 4 * kLanes));
  volatile int32_t keep = sumi(addi(addi(acc[0], acc[1]), addi(acc[2], acc[3])));
  (void)keep;
}

static inline void opaque(void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// `products` dot products in registers only: Dot::kRows words times two, over and over. The loops over the chains
// are unrolled, for an array that is indexed by a variable lies in memory; the compiler must see neither that all chains
// hold the same nor that the words never change, which each turn loads anew.
template <class Dot>
static void multiply(int64_t products) {
  constexpr int kRows = Dot::kRows, kChains = 2 * kRows;
  typename Dot::Acc chains[kChains], acc[kChains];
  I words[kRows + 2];
  for (int i = 0; i < kChains; ++i) clear(chains[i]);
  for (int i = 0; i < kRows + 2; ++i) words[i] = as_int(setf(1.0f));
  opaque(chains);
  opaque(words);
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = chains[i];
  for (int64_t n = 0; n < products; n += kChains * kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < Dot::kParts; ++part)
#pragma GCC unroll 32
      for (int i = 0; i < kChains; ++i)
        acc[i] = Dot::dot(acc[i], words[i / 2], Dot::weight(words[kRows + i % 2], part));
    asm volatile("" ::: "memory");
  }
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chains[i] = acc[i];
  opaque(chains);
}

static void peak(int format, int64_t products, Scratch&) {
  if (format == KVIK_FP32) multiply<Fp32Dot>(products);
  else if (format == KVIK_BF16) multiply<Bf16Product>(products);
  else multiply<Int8Product>(products);
}
