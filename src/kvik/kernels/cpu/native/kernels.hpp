// What the scheduler (pool.cpp) knows of an instruction set: one table of functions, each computing one work item.
//
// An op runs as one or more stages; a stage is a number of independent items that any worker may take. Whatever a
// stage computes depends only on the item, so neither the number of workers nor their order changes a bit of it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kvik_cpu.h"

namespace kvik {

// Functions of this header are compiled once per instruction set and must not be shared between them by the linker.
#define KVIK_INLINE inline __attribute__((always_inline))

constexpr int kPanel = 32;   // outputs of a packed panel
constexpr int kMaxTile = 12;  // rows of activations that a microkernel call takes
constexpr int kChunk = 256;   // tokens of context in one item of decode attention (four times that past kLongContext)
constexpr int kLongContext = 16384;
constexpr int kMaxHeadDim = 512;
constexpr int kKeyTile = 128;  // keys per inner step of prefill attention
constexpr int kQueryRows = 192;  // rows (queries x heads of a group) of one item of prefill attention

// Memory of one thread or one run, grown on demand and 64-byte aligned.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  void* get(size_t bytes);
  int tile_rows = 0;  // of the tile registers as this thread has set them up; 0: not at all

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// How many rows of activations a token takes.
KVIK_INLINE int rows_per_token(const KvikLinear& w) { return 1 + w.fine; }

// Rows (or tokens) cut into tiles: of nearly equal size, at most `most`, or of a given size but the last.
struct Tiling {
  int rows = 0, tiles = 0, base = 0, extra = 0;
  static KVIK_INLINE Tiling of(int rows, int most) {
    Tiling t;
    t.rows = rows;
    t.tiles = (rows + most - 1) / most;
    if (t.tiles) t.base = rows / t.tiles, t.extra = rows % t.tiles;
    return t;
  }
  static KVIK_INLINE Tiling whole(int rows, int size) {
    Tiling t;
    t.rows = rows, t.tiles = (rows + size - 1) / size, t.base = size;
    return t;
  }
  KVIK_INLINE int start(int tile) const { return tile * base + (tile < extra ? tile : extra); }
  KVIK_INLINE int size(int tile) const {
    int full = base + (tile < extra ? 1 : 0), left = rows - start(tile);
    return full < left ? full : left;
  }
};

// How the queries of one sequence are split into items: chunks of context for one query, tiles of queries for several.
struct SequencePlan {
  int first_item, parts;  // items = parts * num_kv_heads / heads
  int heads;              // key/value heads per item, which changes no bit of the result
  int first_part;         // decode: index of the first chunk of context
  int chunk;              // decode: tokens per chunk; prefill: queries per tile
  int64_t partial;        // decode: offset of the sequence's partial results, in floats
};

struct Job {
  const KvikOp* op = nullptr;
  const KvikStep* step = nullptr;
  int stage = 0, rows = 0;
  Tiling tiling;               // LINEAR: of tokens
  int tiles_per_item = 0;      // LINEAR, GEMM stage: tiles that one item multiplies with one panel
  uint8_t* activations = nullptr;  // LINEAR: packed tiles, tile_bytes apart
  int64_t tile_bytes = 0;
  const SequencePlan* sequences = nullptr;  // ATTENTION
  float* partials = nullptr;
  std::atomic<int>* arrivals = nullptr;  // ATTENTION: [num_seqs * num_kv_heads]
};

using ItemFn = void (*)(const Job& job, int item, Scratch& scratch);

struct Kernels {
  ItemFn embed, norm, linear_prepare, linear_gemm, rope_store, attention, argmax;
  void (*read)(const void* data, int64_t bytes);
  void (*peak)(int format, int64_t products, Scratch& scratch);
  int (*rows_at_once)(const KvikLinear& w);  // rows of a tile of activations: kMaxTile, or more
  int (*input_words)(const KvikLinear& w);   // words that a word of a row takes in a tile
  void (*leave)(Scratch& scratch);           // before a thread sleeps or does something else
};

// Levels, lowest first; each also has what the lower ones have. A build for another architecture has the generic one only.
enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAvx512Bf16 = 4, kAmx = 5, kNumIsas = 6 };
const Kernels& kernels_generic();
#if defined(__x86_64__) || defined(_M_X64)
#define KVIK_X86 1
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_vnni();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();
#endif
const Kernels& kernels_for(int isa);

// packing.cpp: items are panels.
void pack_panel(const KvikOp& op, int panel);
void pack_panel_quantized(const KvikOp& op, int panel);
void unpack_panel(const KvikOp& op, int panel);
void unpack_panel_quantized(const KvikOp& op, int panel);

}  // namespace kvik
