// Every kernel for processors without a better path, in the compiler's vector types.
#include "kernels.hpp"

namespace kvik {
namespace generic {

#include "simd_generic.hpp"
#include "gemm.hpp"
#include "linear.hpp"
#include "elementwise.hpp"
#include "attention.hpp"
#include "attention_prefill.hpp"

const Kernels kTable = {embed, norm, linear_prepare, linear_gemm, rope_store, attention, argmax, read,
                        peak, few_rows, input_words, stay};

}  // namespace generic

const Kernels& kernels_generic() { return generic::kTable; }

}  // namespace kvik
