// Every kernel for AVX-512 with VNNI and BF16 dot products. Compiled with the flags that setup.py gives.
#include "kernels.hpp"

#if defined(KVIK_X86)
#include <immintrin.h>

#define KVIK_HAS_VNNI 1
#define KVIK_HAS_BF16 1

namespace kvik {
namespace avx512_bf16 {

#include "simd_avx512.hpp"
#include "gemm.hpp"
#include "linear.hpp"
#include "elementwise.hpp"
#include "attention.hpp"
#include "attention_prefill.hpp"

const Kernels kTable = {embed, norm, linear_prepare, linear_gemm, rope_store, attention, argmax, read,
                        peak, few_rows, input_words, stay};

}  // namespace avx512_bf16

const Kernels& kernels_avx512_bf16() { return avx512_bf16::kTable; }

}  // namespace kvik
#endif
