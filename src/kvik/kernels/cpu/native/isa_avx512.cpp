// Every kernel for AVX-512 without dot products of narrow types. Compiled with the flags that setup.py gives.
#include "kernels.hpp"

#if defined(KVIK_X86)
#include <immintrin.h>

#define KVIK_HAS_VNNI 0
#define KVIK_HAS_BF16 0

namespace kvik {
namespace avx512 {

#include "simd_avx512.hpp"
#include "gemm.hpp"
#include "linear.hpp"
#include "elementwise.hpp"
#include "attention.hpp"
#include "attention_prefill.hpp"

const Kernels kTable = {embed, norm, linear_prepare, linear_gemm, rope_store, attention, argmax, read,
                        peak, few_rows, input_words, stay};

}  // namespace avx512

const Kernels& kernels_avx512() { return avx512::kTable; }

}  // namespace kvik
#endif
