// Projections: the activations of a tile are normalised, converted and packed once (prepare), then multiplied with the
// panels (gemm), whose results pass through an epilogue: scales, bias, residual or SwiGLU. Included per instruction set.
//
//     packed tile    words [words][parts][rows] | scales [groups][rows] fp32 | sums [groups][rows] int32
//                    parts of what `Dot` multiplies, see gemm.hpp; scales and sums of int8 and int4 alone
//
// A token is one row. Where a weight is `fine`, a token is two rows side by side, the second of which is what rounding
// the first left, and its result is the sum of theirs: 15 bits for activations, and weights are still read once.

static int few_rows(const KvikLinear&) { return kMaxTile; }
static int input_words(const KvikLinear& w) {
  return w.format == KVIK_BF16 ? Bf16Product::kParts : w.format == KVIK_INT8 ? Int8Product::kParts : 1;
}
static void stay(Scratch&) {}

struct Add {
  inline F operator()(F a, F b) const { return add(a, b); }
};
struct Max {
  inline F operator()(F a, F b) const { return maxf(a, b); }
};

// src [rows, words] -> dst [words, rows], whose words are `step` apart
static void interleave(const uint32_t* src, int64_t src_stride, int rows, int words, uint32_t* dst, int64_t step) {
  for (int r = 0; r < rows; r += kLanes)
    for (int k = 0; k < words; k += kLanes)
      transpose(src + r * src_stride + k, src_stride, dst + k * step + r, step, rows - r < kLanes ? rows - r : kLanes,
                words - k < kLanes ? words - k : kLanes);
}

// src [rows, words] -> dst [words, parts, rows], as Dot multiplies them; behind src there is room for as much and a vector.
template <class Dot>
static void interleave_parts(uint32_t* src, int64_t src_stride, int rows, int words, uint32_t* dst) {
  if constexpr (Dot::kParts == 1) {
    interleave(src, src_stride, rows, words, dst, rows);
  } else {
    uint32_t* halves = src + rows * src_stride;
    for (int part = 0; part < Dot::kParts; ++part) {
      for (int r = 0; r < rows; ++r)
        for (int64_t k = 0; k < words; k += kLanes)
          storew(halves + r * src_stride + k, Dot::input(loadw(src + r * src_stride + k), part));
      interleave(halves, src_stride, rows, words, dst + part * rows, Dot::kParts * rows);
    }
  }
}

// 1 / sqrt(mean(x^2) + eps)
static float rms_inverse(const float* x, float eps, int n) {
  int whole = n / kLanes * kLanes, i = 0;
  F squares[4] = {setf(0), setf(0), setf(0), setf(0)};
  while (i < whole)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, i += kLanes)
      if (i < whole) squares[j] = fma(loadf(x + i), loadf(x + i), squares[j]);
  float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  for (i = whole; i < n; ++i) total += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(total / float(n) + eps);
}

// out[0, n) = x * weight / sqrt(mean(x^2) + eps), or x where weight is null; zeros up to `padded`, a multiple of 16.
static void normalise(const float* x, const float* weight, float eps, int n, int padded, float* out) {
  int whole = n / kLanes * kLanes, i = 0;
  if (!weight) {
    for (; i < whole; i += kLanes) storef(out + i, loadf(x + i));
    for (; i < n; ++i) out[i] = x[i];
  } else {
    float inverse = rms_inverse(x, eps, n);
    F factor = setf(inverse);
    for (; i < whole; i += kLanes) storef(out + i, mul(mul(loadf(x + i), factor), loadf(weight + i)));
    for (; i < n; ++i) out[i] = x[i] * inverse * weight[i];
  }
  for (; i < padded; ++i) out[i] = 0;
}

// max |x| of each lane; NaN where any x of the lane is not finite, which a maximum alone forgets
static F tops_of(const float* x, int n) {
  F top = setf(0), broken = setf(0);
  for (int i = 0; i < n; i += kLanes) {
    F value = loadf(x + i);
    top = maxf(top, absf(value));
    broken = fma(value, setf(0), broken);
  }
  return add(top, broken);
}

// q = round(x / scale) with scale = max |x| / 127; returns the scale and the sum of q. n is a multiple of 16.
static float quantise(const float* x, int n, int8_t* q, int32_t* total) {
  F tops = tops_of(x, n);
  float most = largest(tops) + 0 * sum(tops);  // NaN if any x is broken, and so is the result then
  F inverse = setf(most > 1e-30f ? 127.0f / most : 0.0f);
  I count = seti(0);
  for (int i = 0; i < n; i += kLanes) {
    I value = to_int(mul(loadf(x + i), inverse));
    count = addi(count, value);
    store_s8(q + i, value);
  }
  *total = sumi(count);
  return most / 127.0f;
}

// `rows` rows of int8, `stride` bytes apart, whose scaled sum is x: each rounds what those before it left of x.
static void quantise_rows(float* x, int n, int rows, int8_t* q, int64_t stride, float* scales, int32_t* sums) {
  for (int r = 0; r < rows; ++r, q += stride) {
    if (r > 0)
      for (int i = 0; i < n; i += kLanes)
        storef(x + i, fma(load_s8(q - stride + i), setf(-scales[r - 1]), loadf(x + i)));
    int32_t total;
    scales[r] = quantise(x, n, q, &total);
    sums[r] = -128 * total;
  }
}

// As `quantise`, for groups of `size` (32 or 128) values, a row of kLanes groups at a time; scales and sums are `step` apart.
static void quantise_groups(const float* x, int groups, int size, int8_t* q, float* scales, int32_t* sums, int step) {
  alignas(64) float parts[kLanes * kLanes], most[kLanes], inverse[kLanes], totals[kLanes];
  for (int first = 0; first < groups; first += kLanes) {
    int count = groups - first < kLanes ? groups - first : kLanes;
    for (int g = 0; g < kLanes; ++g) {
      storef(parts + g * kLanes, tops_of(x + (first + (g < count ? g : 0)) * size, size));
    }
    F tops = reduce_rows(parts, Max());
    storef(most, divide(fma(reduce_rows(parts, Add()), setf(0), tops), setf(127.0f)));  // NaN for a broken group
    storef(inverse, divide(setf(127.0f), maxf(tops, setf(1e-30f))));
    for (int g = 0; g < count; ++g) {
      I total = seti(0);
      for (int i = 0; i < size; i += kLanes) {
        I value = to_int(mul(loadf(x + (first + g) * size + i), setf(inverse[g])));
        total = addi(total, value);
        store_s8(q + (first + g) * size + i, value);
      }
      storef(parts + g * kLanes, to_float(total));
    }
    storef(totals, reduce_rows(parts, Add()));  // exact: integers below 2^24
    for (int g = 0; g < count; ++g) {
      scales[(first + g) * step] = most[g];
      sums[(first + g) * step] = -8 * int32_t(totals[g]);
    }
  }
}

struct TileView {
  uint32_t* words;
  float* scales;
  int32_t* sums;
  int start, tokens, rows;
};

static TileView tile_view(const Job& job, int tile) {
  const KvikLinear& w = *job.op->linear;
  int tokens = job.tiling.size(tile), rows = tokens * rows_per_token(w), groups = w.format == KVIK_INT4 ? w.blocks : 1;
  uint32_t* words = (uint32_t*)(job.activations + job.tile_bytes * tile);
  float* scales = (float*)(words + int64_t{input_words(w)} * w.words * rows);
  return {words, scales, (int32_t*)(scales + int64_t{groups} * rows), job.tiling.start(tile), tokens, rows};
}

static void linear_prepare(const Job& job, int tile, Scratch& scratch) {
  const KvikOp& op = *job.op;
  const KvikLinear& w = *op.linear;
  TileView view = tile_view(job, tile);
  int per_word = w.format == KVIK_FP32 ? 1 : w.format == KVIK_BF16 ? 2 : 4;
  int padded = (w.words * per_word + 15) / 16 * 16, row_words = padded / per_word + 16, times = rows_per_token(w);
  float* row = (float*)scratch.get(sizeof(float) * padded + sizeof(uint32_t) * (row_words * kMaxTile * input_words(w) + kLanes));
  uint32_t* packed = (uint32_t*)(row + padded);
  for (int m = 0; m < view.tokens; ++m) {
    uint32_t* out = packed + m * times * row_words;
    normalise((const float*)op.x + (view.start + m) * op.width, op.norm, op.eps, w.k, padded, row);
    if (w.format == KVIK_FP32) {
      for (int i = 0; i < padded; i += kLanes) storef((float*)out + i, loadf(row + i));
    } else if (w.format == KVIK_BF16) {
      for (int i = 0; i < padded; i += kLanes) store_bf16((uint16_t*)out + i, loadf(row + i));
    } else if (w.format == KVIK_INT8) {
      quantise_rows(row, padded, times, (int8_t*)out, 4 * row_words, view.scales + m * times, view.sums + m * times);
    } else {
      quantise_groups(row, w.blocks, w.group, (int8_t*)out, view.scales + m, view.sums + m, view.rows);
    }
  }
  if (w.format == KVIK_BF16) interleave_parts<Bf16Product>(packed, row_words, view.rows, w.words, view.words);
  else if (w.format == KVIK_INT8) interleave_parts<Int8Product>(packed, row_words, view.rows, w.words, view.words);
  else interleave(packed, row_words, view.rows, w.words, view.words, view.rows);
}

static inline F exp_f(F x) {  // relative error below 2e-7; 0 below -87
  x = minf(maxf(x, setf(-87.3f)), setf(88.3f));
  I n = to_int(mul(x, setf(1.44269504088896341f)));
  F whole = to_float(n);
  F r = fma(whole, setf(-0.693145751953125f), x);
  r = fma(whole, setf(-1.4286067653e-6f), r);
  F p = setf(1.9875691500e-4f);
  p = fma(p, r, setf(1.3981999507e-3f));
  p = fma(p, r, setf(8.3334519073e-3f));
  p = fma(p, r, setf(4.1665795894e-2f));
  p = fma(p, r, setf(1.6666665459e-1f));
  p = fma(p, r, setf(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), setf(1.0f));
  return mul(p, as_float(shift_left<23>(addi(n, seti(127)))));
}

static inline F silu(F x) { return quotient(x, add(setf(1.0f), exp_f(sub(setf(0.0f), x)))); }

// Writes `values` [n valid of 32] to y, adding the residual if there is one.
static inline void emit(const float* values, int n, const float* residual, float* y) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F x = loadf(values + i);
    storef(y + i, residual ? add(loadf(residual + i), x) : x);
  }
  for (; i < n; ++i) y[i] = residual ? residual[i] + values[i] : values[i];
}

static void epilogue(const KvikOp& op, int panel, const TileView& view, float* c) {
  const KvikLinear& w = *op.linear;
  const float* bias = w.bias ? w.bias + panel * kPanel : nullptr;
  int width = w.swiglu ? w.n / 2 : w.n, step = w.swiglu ? kPanel / 2 : kPanel;
  int first = panel * step, valid = width - first < step ? width - first : step, times = rows_per_token(w);
  for (int m = 0; m < view.tokens; ++m) {
    float* row = c + m * times * kPanel;
    if (w.format == KVIK_INT8)
      for (int i = 0; i < kPanel; i += kLanes) {
        F scale = loadf(w.scales + panel * kPanel + i), y = setf(0);
        for (int r = 0; r < times; ++r) {
          F whole = to_float(addi(loadw(row + r * kPanel + i), seti(view.sums[m * times + r])));
          y = fma(whole, mul(setf(view.scales[m * times + r]), scale), y);
        }
        storef(row + i, y);
      }
    if (bias)
      for (int i = 0; i < kPanel; i += kLanes) storef(row + i, add(loadf(row + i), loadf(bias + i)));
    if (w.swiglu)
      for (int i = 0; i < kPanel / 2; i += kLanes)
        storef(row + i, mul(silu(loadf(row + i)), loadf(row + kPanel / 2 + i)));
    int64_t at = int64_t{view.start + m} * width + first;
    emit(row, valid, op.residual ? op.residual + at : nullptr, (float*)op.y + at);
  }
}

static void linear_gemm(const Job& job, int item, Scratch&) {
  const KvikOp& op = *job.op;
  const KvikLinear& w = *op.linear;
  int panel = item % w.panels, first = item / w.panels * job.tiles_per_item;
  int last = first + job.tiles_per_item < job.tiling.tiles ? first + job.tiles_per_item : job.tiling.tiles;
  const uint8_t* data = w.data + w.panel_bytes * panel;
  // With several tiles, the panel that this worker probably takes next comes in meanwhile, a part with every tile.
  const uint8_t* next = panel + 1 < w.panels && last - first > 1 ? data + w.panel_bytes : nullptr;
  int64_t slice = (w.panel_bytes / (last - first) + 63) / 64 * 64;
  alignas(64) float c[kMaxTile * kPanel];
  for (int tile = first; tile < last; ++tile) {
    if (next)
      for (int64_t i = 0, at = slice * (tile - first); i < slice && at + i < w.panel_bytes; i += 64)
        __builtin_prefetch(next + at + i, 0, 2);
    TileView view = tile_view(job, tile);
    switch (w.format) {
      case KVIK_FP32:
        gemm<Fp32Dot, 1>(view.rows, view.words, view.rows, data, w.words, c, kPanel, false);
        break;
      case KVIK_BF16:
        gemm<Bf16Product, 1>(view.rows, view.words, Bf16Product::kParts * view.rows, data, w.words, c, kPanel, false);
        break;
      case KVIK_INT8:
        gemm<Int8Product, 1>(view.rows, view.words, Int8Product::kParts * view.rows, data, w.words, (int32_t*)c, kPanel, false);
        break;
      default:
        if (w.group == 32) gemm_int4<1>(view.rows, view.words, data, w.blocks, view.scales, view.sums, c);
        else gemm_int4<4>(view.rows, view.words, data, w.blocks, view.scales, view.sums, c);
    }
    epilogue(op, panel, view, c);
  }
}
