// SPDX-License-Identifier: Apache-2.0
// The parts of the rule for which a GPU has special instructions, each as a function of a float32.
#pragma once

#include "../../../csrc/core/update_rule.h"

namespace csgd {

enum class Shortcut : int32_t {
  kInverseProbability,  // of n
  kRoundUp,             // of x in [0, 2^16]
  kLimitedProduct,      // of d, with a scale of 1
  kWidenFloat16,        // of sixteen bits, which are given as a number
  kTruncateFloat16,     // of |x| <= 65504; the resulting bits as a number
  kLeastProduct,        // of d
  kLargerOrNan,         // of x and 1
};

CSGD_HOST_DEVICE float take_shortcut(Shortcut shortcut, float x) {
  switch (shortcut) {
    case Shortcut::kInverseProbability: return inverse_probability_above(x + integers<float>());
    case Shortcut::kRoundUp: return round_up_above(x) - integers<float>();
    case Shortcut::kLimitedProduct: return limited_product(x, 1.0f);
    case Shortcut::kWidenFloat16: return Float16Format::widen(static_cast<uint32_t>(x));
    case Shortcut::kTruncateFloat16: return static_cast<float>(Float16Format::truncate(x));
    case Shortcut::kLeastProduct: return least_product(x);
    case Shortcut::kLargerOrNan: return larger_or_nan(x, 1.0f);
  }
  return 0.0f;
}

}  // namespace csgd
