// Every kernel for AVX-512 with VNNI and BF16, projections on AMX tiles. Compiled with the flags that setup.py gives.
#include "kernels.hpp"

#if defined(KVIK_X86)
#include <immintrin.h>

#define KVIK_HAS_VNNI 1
#define KVIK_HAS_BF16 1
#define KVIK_HAS_AMX 1

namespace kvik {
namespace amx {

#include "simd_avx512.hpp"
#include "gemm.hpp"
#include "linear.hpp"
#include "elementwise.hpp"
#include "attention.hpp"
#include "amx.hpp"
#include "attention_prefill.hpp"

const Kernels kTable = {embed, norm, prepare_tiles, gemm_tiles, rope_store, attention, argmax, read,
                        peak_tiles, rows_at_once, input_words, leave_tiles};

}  // namespace amx

const Kernels& kernels_amx() { return amx::kTable; }

}  // namespace kvik
#endif
