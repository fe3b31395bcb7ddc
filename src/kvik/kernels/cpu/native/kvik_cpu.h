// The C ABI of Kvik's CPU kernel library: plain structs and functions, mirrored by kernels/cpu/native.py.
//
// A forward pass is a tape: an array of KvikOp that kvik_run executes in order on a pool of threads. What changes from
// step to step (token ids, slots, block tables) lies in KvikStep, so the same tape serves every step.
//
//     tape   | embed | norm_linear qkv | rope | attention | linear_add o | swiglu | linear_add down | ... | gather_norm |
//     step   num_tokens, input_ids, cos, sin, slots, query_starts, seq_lens, block_tables, logit_indices
//
// Activations are fp32 [rows, features]; weights are packed (see packing.cpp); the KV cache is bf16, fp32, or int8 with a
// scale per token and head.
#pragma once

#include <cstdint>

enum KvikFormat : int32_t { KVIK_FP32 = 0, KVIK_BF16 = 1, KVIK_INT8 = 2, KVIK_INT4 = 3, KVIK_FP16 = 4 };

enum KvikOpCode : int32_t {
  KVIK_EMBED = 0,        // y[t] = row input_ids[t] of x (`type`), or of `linear` when x is null
  KVIK_NORM = 1,         // y[t] = rms_norm(x[t]) * norm
  KVIK_GATHER_NORM = 2,  // y[r] = rms_norm(x[logit_indices[r]]) * norm
  KVIK_LINEAR = 3,       // y = linear(norm ? rms_norm(x) * norm : x) (+ residual), or its SwiGLU
  KVIK_ROPE_STORE = 4,   // q = rotate(norm(q)), k_cache = rotate(norm(k)), v_cache = v
  KVIK_ATTENTION = 5,    // y = softmax(scale q k) v over the paged cache
  KVIK_ARGMAX = 6,       // y[t] = first index of the maximum of x[t], int64
  KVIK_PACK = 7,         // x (`type`, [n, k]) -> linear->data
  KVIK_PACK_QUANTIZED = 8,    // x int8 [n, k] and scales -> linear->data
  KVIK_UNPACK = 9,       // linear -> y fp32 [n, k]
  KVIK_UNPACK_QUANTIZED = 10,  // linear -> y int8 [n, k], `scales` fp32 [n, groups]
  KVIK_READ = 11,        // read x[0, width) bytes: the bandwidth probe
  KVIK_PEAK = 12,        // `rows` items of `width` products of a pair of words of `type`: the arithmetic probe
  KVIK_OP_COUNT = 13,
};

extern "C" {

// A projection of k inputs to n outputs in packed form. swiglu: rows are [gate | up], each n / 2.
struct KvikLinear {
  int32_t format, group, n, k;
  int32_t panels, blocks;  // panels of 32 outputs; words (or for int4 groups) along k
  int32_t swiglu, words;   // words: 32-bit words of an activation row
  int32_t fine;            // int8: 1 where a token's activations take two rows, else 0
  int64_t panel_bytes;
  uint8_t* data;
  float* scales;  // int8: [panels * 32]
  float* bias;    // [panels * 32] in packed order, or null
};

struct KvikOp {
  int32_t code, type;
  const void* x;
  void* y;
  const float* residual;  // [rows, n] or null
  const float* norm;      // [k] or null
  const float* norm2;     // the key norm of ROPE_STORE, or null
  float* scales;          // of quantised sources and results
  const KvikLinear* linear;
  void* k_cache;
  void* v_cache;
  float* k_scales;  // of an int8 cache, [block][kv head][offset]; null where the cache has the type of the query, `type`
  float* v_scales;
  int64_t block_rows;  // rows of head_dim elements (for scales: elements) from a block of a cache to the next one
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  int32_t window;  // 0: none
  int32_t rows;    // 0: the step's tokens; -1: the step's logit rows; else the count itself
  int64_t width;   // features of x
  float eps, scale;
};

struct KvikStep {
  int32_t num_tokens, num_seqs, num_rows, table_stride;
  const int64_t* input_ids;
  const float* cos;  // [num_tokens, head_dim / 2]
  const float* sin;
  const int64_t* slots;
  const int32_t* query_starts;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  const int64_t* logit_indices;
};

#pragma GCC visibility push(default)
int32_t kvik_abi_version();
int32_t kvik_isa_best();                    // highest level that this CPU runs
const char* kvik_isa_name(int32_t level);   // null past the last level
int32_t kvik_linear_layout(KvikLinear* linear);  // fills panels, blocks, words, panel_bytes; 0 when it cannot be packed

// A pool of `threads` workers, the caller being the first. cores[i] is the CPU of worker i; null leaves threads unpinned.
// Returns null where the system does not give that many threads.
void* kvik_pool_create(int32_t threads, int32_t isa, const int32_t* cores, int64_t spin_ns);
void kvik_pool_destroy(void* pool);
void kvik_run(void* pool, const KvikOp* ops, int32_t num_ops, const KvikStep* step);
void kvik_profile(void* pool, double* seconds);  // [KVIK_OP_COUNT] per opcode since the last call; first call switches on
#pragma GCC visibility pop
}
