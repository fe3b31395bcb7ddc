// The exported functions, and which instruction set this CPU has.
#include "pool.hpp"

#if defined(KVIK_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace kvik {
namespace {

const char* const kIsaNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

#if defined(KVIK_X86)
// Whether the CPU has tiles for bf16 and int8, the system saves them, and lets this process use them (Linux asks first).
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 24 | 1u << 25 | 1u << 22, kSavesExtended = 1u << 27, kTileState = 3u << 17;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesExtended)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

int find_best_isa() {
#if defined(KVIK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512Vnni;
  return has_amx() ? kAmx : kAvx512Bf16;
#else
  return kGeneric;
#endif
}

int best_isa() {
  static const int best = find_best_isa();
  return best;
}

}  // namespace

const Kernels& kernels_for(int isa) {
#if defined(KVIK_X86)
  switch (isa < best_isa() ? isa : best_isa()) {
    case kAmx: return kernels_amx();
    case kAvx512Bf16: return kernels_avx512_bf16();
    case kAvx512Vnni: return kernels_avx512_vnni();
    case kAvx512: return kernels_avx512();
    case kAvx2: return kernels_avx2();
    default: break;
  }
#else
  (void)isa;
#endif
  return kernels_generic();
}

}  // namespace kvik

extern "C" {

int32_t kvik_abi_version() { return 4; }
int32_t kvik_isa_best() { return kvik::best_isa(); }
const char* kvik_isa_name(int32_t level) {
  return level >= 0 && level < kvik::kNumIsas ? kvik::kIsaNames[level] : nullptr;
}

int32_t kvik_linear_layout(KvikLinear* w) {
  if (w->n < 1 || w->k < 1 || w->k > 65536) return 0;  // int8 sums of 255 * 127 * k must fit 31 bits
  if (w->swiglu && w->n % 2) return 0;
  int outputs = w->swiglu ? w->n / 2 : w->n, per_panel = w->swiglu ? kvik::kPanel / 2 : kvik::kPanel;
  w->panels = (outputs + per_panel - 1) / per_panel;
  int per_word = w->format == KVIK_FP32 ? 1 : w->format == KVIK_BF16 ? 2 : 4;
  w->words = (w->k + per_word - 1) / per_word;
  w->blocks = w->words;
  w->panel_bytes = int64_t{w->words} * kvik::kPanel * 4;
  if (w->format == KVIK_INT4) {
    if (w->group != 32 && w->group != 128) return 0;
    w->blocks = (w->k + w->group - 1) / w->group;
    w->words = w->blocks * w->group / 4;
    w->panel_bytes = int64_t{w->blocks} * (64 + 16 * w->group);
  }
  return w->panels < (1 << 19);
}

void* kvik_pool_create(int32_t threads, int32_t isa, const int32_t* cores, int64_t spin_ns) {
  try {
    return new kvik::Pool(threads, isa, cores, spin_ns);
  } catch (const std::exception&) {
    return nullptr;
  }
}
void kvik_pool_destroy(void* pool) { delete static_cast<kvik::Pool*>(pool); }
void kvik_run(void* pool, const KvikOp* ops, int32_t num_ops, const KvikStep* step) {
  static_cast<kvik::Pool*>(pool)->run(ops, num_ops, step);
}
void kvik_profile(void* pool, double* seconds) { static_cast<kvik::Pool*>(pool)->profile(seconds); }
}
