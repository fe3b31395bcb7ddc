// Weights in the layout that gemm.hpp multiplies, and back. One panel holds 32 outputs over all of k:
//
//     fp32, bf16, int8    word 0: | o0 ... o31 |  word 1: ...     a word is 1 fp32, 2 bf16 or 4 bytes of int8 + 128
//     int4                group 0: | 32 fp16 scales | nibbles |  group 1: ...    see block_int4 in gemm.hpp
//
// What lies past n or k is zero. With swiglu a panel is 16 gate rows and the 16 up rows that belong to them.
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.hpp"

namespace kvik {
namespace {

// Which row of the unpacked weight is at `lane` of `panel`: -1 for padding. With swiglu, 16 gate rows then 16 up rows.
int packed_row(const KvikLinear& w, int panel, int lane) {
  if (!w.swiglu) {
    int row = panel * kPanel + lane;
    return row < w.n ? row : -1;
  }
  int half = w.n / 2, row = panel * (kPanel / 2) + lane % (kPanel / 2);
  if (row >= half) return -1;
  return lane < kPanel / 2 ? row : half + row;
}


float from_half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits = rest << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112: denormals too
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x7c00) bits = (rest << 13) | 0x7f800000;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_half(float x) {  // to nearest, ties to even; large values become the largest finite one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  float size = std::fabs(x);
  if (!(size < 65504.0f)) return uint16_t(sign | 0x7bff);
  if (size < 6.103515625e-5f) return uint16_t(sign | uint16_t(std::nearbyint(size * 16777216.0f)));  // denormal
  bits = (bits & 0x7fffffff) - (112u << 23);
  return uint16_t(sign | uint16_t((bits + 0xfff + ((bits >> 13) & 1)) >> 13));
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t((bits | 0x400000) >> 16);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void load_row(const KvikOp& op, int64_t row, float* out) {
  int k = op.linear->k;
  if (op.type == KVIK_FP32) {
    std::memcpy(out, static_cast<const float*>(op.x) + row * k, sizeof(float) * size_t(k));
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(op.x) + row * k;
  for (int i = 0; i < k; ++i) {
    uint32_t bits = uint32_t(x[i]) << 16;
    if (op.type == KVIK_BF16) std::memcpy(out + i, &bits, 4);
    else out[i] = from_half(x[i]);
  }
}

int record_bytes(const KvikLinear& w) { return 64 + 16 * w.group; }

// Where the byte of input k and lane is in an int4 panel; `odd` says which nibble.
uint8_t* nibble(const KvikLinear& w, uint8_t* panel, int k, int lane, bool* odd) {
  int inner = k % w.group, word = inner / 4;
  *odd = word & 1;
  return panel + int64_t{k / w.group} * record_bytes(w) + 64 + word / 2 * 128 + lane * 4 + inner % 4;
}

void put_int4(const KvikLinear& w, uint8_t* panel, int lane, const int8_t* q, const uint16_t* scales) {
  for (int g = 0; g < w.blocks; ++g)
    std::memcpy(panel + int64_t{g} * record_bytes(w) + lane * 2, scales + g, 2);
  for (int k = 0; k < w.blocks * w.group; ++k) {
    bool odd;
    uint8_t* byte = nibble(w, panel, k, lane, &odd);
    int value = (k < w.k ? q[k] : 0) + 8;
    *byte = uint8_t(odd ? (*byte & 15) | value << 4 : (*byte & 0xf0) | value);
  }
}

// The best of a few scales for one group, by squared error: q in [-8, 7], scale rounded to fp16.
uint16_t quantise_group(const float* x, int n, int8_t* q) {
  float most = 0, extreme = 0;
  for (int i = 0; i < n; ++i)
    if (std::fabs(x[i]) > most) most = std::fabs(x[i]), extreme = x[i];
  uint16_t best_scale = 0;
  float best = INFINITY;
  int8_t trial[128] = {};
  if (most == 0) return 0;  // q is zero already
  for (float range : {-8.0f, -8.6f, -9.2f, -7.5f, 7.0f}) {
    uint16_t half = to_half(extreme / range);
    float scale = from_half(half), error = 0;
    if (scale == 0) continue;
    float inverse = 1.0f / scale;
    for (int i = 0; i < n; ++i) {
      float value = std::nearbyint(x[i] * inverse);
      value = value < -8 ? -8 : value > 7 ? 7 : value;
      trial[i] = int8_t(value);
      float d = x[i] - value * scale;
      error += d * d;
    }
    if (error < best) {
      best = error, best_scale = half;
      std::memcpy(q, trial, size_t(n));
    }
  }
  return best_scale;
}

float quantise_row(const float* x, int n, int8_t* q) {  // torch: round(x / scale), scale = max |x| / 127
  float most = 0;
  for (int i = 0; i < n; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  float scale = most > 0 ? most / 127.0f : 1.0f;
  for (int i = 0; i < n; ++i) {
    float value = std::nearbyint(x[i] / scale);
    q[i] = int8_t(value < -127 ? -127 : value > 127 ? 127 : value);
  }
  return scale;
}

void put_int8(const KvikLinear& w, uint8_t* panel, int lane, const int8_t* q) {
  for (int k = 0; k < w.words * 4; ++k) panel[(k / 4) * 128 + lane * 4 + k % 4] = uint8_t((k < w.k ? q[k] : 0) + 128);
}

}  // namespace

void pack_panel(const KvikOp& op, int panel) {
  const KvikLinear& w = *op.linear;
  uint8_t* out = w.data + w.panel_bytes * panel;
  std::memset(out, 0, size_t(w.panel_bytes));
  std::vector<float> row(size_t(w.k) + 256, 0.0f);
  std::vector<int8_t> q(size_t(w.k) + 256, 0);
  std::vector<uint16_t> scales(size_t(w.blocks), 0);
  for (int lane = 0; lane < kPanel; ++lane) {
    int source = packed_row(w, panel, lane);
    if (w.format == KVIK_INT8) w.scales[panel * kPanel + lane] = 1.0f;
    std::memset(q.data(), 0, q.size());
    if (source >= 0) load_row(op, source, row.data());
    else std::memset(row.data(), 0, row.size() * sizeof(float));
    if (w.format == KVIK_INT4) {
      for (int g = 0; g < w.blocks; ++g) {
        int left = w.k - g * w.group;
        scales[size_t(g)] = quantise_group(row.data() + g * w.group, left < w.group ? left : w.group, q.data() + g * w.group);
      }
      put_int4(w, out, lane, q.data(), scales.data());
    } else if (w.format == KVIK_INT8) {
      w.scales[panel * kPanel + lane] = quantise_row(row.data(), w.k, q.data());
      put_int8(w, out, lane, q.data());
    } else if (w.format == KVIK_BF16) {
      uint16_t* halves = reinterpret_cast<uint16_t*>(out);
      for (int k = 0; k < w.k; ++k) halves[(k / 2) * 64 + lane * 2 + k % 2] = to_bf16(row[size_t(k)]);
    } else {
      float* floats = reinterpret_cast<float*>(out);
      for (int k = 0; k < w.k; ++k) floats[k * kPanel + lane] = row[size_t(k)];
    }
  }
}

void pack_panel_quantized(const KvikOp& op, int panel) {
  const KvikLinear& w = *op.linear;
  uint8_t* out = w.data + w.panel_bytes * panel;
  std::memset(out, 0, size_t(w.panel_bytes));
  std::vector<int8_t> zeros(size_t(w.k), 0);
  std::vector<uint16_t> scales(size_t(w.blocks), 0);
  for (int lane = 0; lane < kPanel; ++lane) {
    int64_t source = packed_row(w, panel, lane);
    const int8_t* q = source < 0 ? zeros.data() : static_cast<const int8_t*>(op.x) + source * w.k;
    if (w.format == KVIK_INT8) {
      w.scales[panel * kPanel + lane] = source < 0 ? 1.0f : op.scales[source];
      put_int8(w, out, lane, q);
    } else {
      for (int g = 0; g < w.blocks; ++g)
        scales[size_t(g)] = source < 0 ? uint16_t(0) : to_half(op.scales[source * w.blocks + g]);
      put_int4(w, out, lane, q, scales.data());
    }
  }
}

void unpack_panel_quantized(const KvikOp& op, int panel) {
  const KvikLinear& w = *op.linear;
  uint8_t* in = w.data + w.panel_bytes * panel;
  for (int lane = 0; lane < kPanel; ++lane) {
    int64_t row = packed_row(w, panel, lane);
    if (row < 0) continue;
    int8_t* q = static_cast<int8_t*>(op.y) + row * w.k;
    if (w.format == KVIK_INT8) {
      op.scales[row] = w.scales[panel * kPanel + lane];
      for (int k = 0; k < w.k; ++k) q[k] = int8_t(int(in[(k / 4) * 128 + lane * 4 + k % 4]) - 128);
      continue;
    }
    for (int g = 0; g < w.blocks; ++g) {
      uint16_t half;
      std::memcpy(&half, in + int64_t{g} * record_bytes(w) + lane * 2, 2);
      op.scales[row * w.blocks + g] = from_half(half);
    }
    for (int k = 0; k < w.k; ++k) {
      bool odd;
      uint8_t byte = *nibble(w, in, k, lane, &odd);
      q[k] = int8_t((odd ? byte >> 4 : byte & 15) - 8);
    }
  }
}

void unpack_panel(const KvikOp& op, int panel) {
  const KvikLinear& w = *op.linear;
  uint8_t* in = w.data + w.panel_bytes * panel;
  for (int lane = 0; lane < kPanel; ++lane) {
    int64_t row = packed_row(w, panel, lane);
    if (row < 0) continue;
    float* out = static_cast<float*>(op.y) + row * w.k;
    for (int k = 0; k < w.k; ++k) {
      if (w.format == KVIK_FP32) {
        std::memcpy(out + k, in + (int64_t{k} * kPanel + lane) * 4, 4);
      } else if (w.format == KVIK_BF16) {
        uint16_t half;
        std::memcpy(&half, in + (k / 2) * 128 + lane * 4 + k % 2 * 2, 2);
        uint32_t bits = uint32_t(half) << 16;
        std::memcpy(out + k, &bits, 4);
      } else if (w.format == KVIK_INT8) {
        out[k] = float(int(in[(k / 4) * 128 + lane * 4 + k % 4]) - 128) * w.scales[panel * kPanel + lane];
      } else {
        bool odd;
        uint8_t byte = *nibble(w, in, k, lane, &odd);
        uint16_t half;
        std::memcpy(&half, in + int64_t{k / w.group} * record_bytes(w) + lane * 2, 2);
        out[k] = float((odd ? byte >> 4 : byte & 15) - 8) * from_half(half);
      }
    }
  }
}

}  // namespace kvik
