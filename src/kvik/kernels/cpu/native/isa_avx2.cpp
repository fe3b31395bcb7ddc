// Every kernel for AVX2 with FMA and F16C. Compiled with the flags that setup.py gives to this file.
#include "kernels.hpp"

#if defined(KVIK_X86)
#include <immintrin.h>

namespace kvik {
namespace avx2 {

#include "simd_avx2.hpp"
#include "gemm.hpp"
#include "linear.hpp"
#include "elementwise.hpp"
#include "attention.hpp"
#include "attention_prefill.hpp"

const Kernels kTable = {embed, norm, linear_prepare, linear_gemm, rope_store, attention, argmax, read,
                        peak, few_rows, input_words, stay};

}  // namespace avx2

const Kernels& kernels_avx2() { return avx2::kTable; }

}  // namespace kvik
#endif
