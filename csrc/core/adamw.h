// SPDX-License-Identifier: Apache-2.0
// The direction of torch.optim.AdamW. g is the gradient, unscaled and with the sign of a descent; t counts from 1:
//     m <- beta1 * m + (1 - beta1) * g
//     v <- beta2 * v + (1 - beta2) * (g * g)
//     d  = (a * m) / (sqrt(v) * s + eps) + weight_decay * x      a = 1 / (1 - beta1^t), s = 1 / sqrt(1 - beta2^t)
//
// D. P. Kingma, J. Ba: "Adam: a method for stochastic optimization", ICLR 2015; I. Loshchilov, F. Hutter: "Decoupled
// weight decay regularization", ICLR 2019. docs/adamw.md has the order of the operations, each rounded on its own.
#pragma once

#include "update_rule.h"

namespace csgd {

// base^exponent by square-and-multiply, of which each product is rounded: the same bits on every machine, as those of
// pow() are not.
CSGD_HOST_DEVICE double power(double base, uint64_t exponent) {
  double result = 1.0;
  for (int bit = bit_length(exponent) - 1; bit >= 0; --bit) {
    result = result * result;
    if ((exponent >> bit & 1) != 0) result = result * base;
  }
  return result;
}

template <class T>
struct AdamWOptionScalars : OptionScalars<T> {
  T beta1;
  T beta2;
  T one_minus_beta1;
  T one_minus_beta2;
  T eps;
};

template <class T>
struct AdamWTensorScalars {
  T mean_factor;  // a
  T root_factor;  // s
};

// Whether the options have weight decay: decided while running, or while compiling.
struct RuntimeDecay {
  bool weight_decay;
  CSGD_HOST_DEVICE explicit RuntimeDecay(const AdamWOptions& options) : weight_decay(options.weight_decay != 0) {}
};

template <bool kWeightDecay>
struct StaticDecay {
  static constexpr bool weight_decay = kWeightDecay;
  CSGD_HOST_DEVICE explicit StaticDecay(const AdamWOptions&) {}
};

template <class T, class Decay>
class AdamWDirection {
 public:
  CSGD_HOST_DEVICE AdamWDirection(const AdamWOptions& options, const AdamWOptionScalars<T>& numbers,
                                  AdamWTensorScalars<T> of_tensor)
      : numbers_(numbers), of_tensor_(of_tensor), decay_(options) {}

  // As those of SgdDirection.
  CSGD_HOST_DEVICE constexpr bool has_buffers() const { return true; }
  CSGD_HOST_DEVICE constexpr bool reads_param() const { return decay_.weight_decay; }
  CSGD_HOST_DEVICE constexpr bool is_first() const { return false; }
  CSGD_HOST_DEVICE const AdamWDirection& of_later_steps() const { return *this; }

  template <class Value>
  CSGD_HOST_DEVICE Value operator()(Value g, Value param, Value (&buffers)[2]) const {
    Value &m = buffers[0], &v = buffers[1];
    m = numbers_.beta1 * m + numbers_.one_minus_beta1 * g;
    v = numbers_.beta2 * v + numbers_.one_minus_beta2 * (g * g);
    Value d = (of_tensor_.mean_factor * m) / (square_root(v) * of_tensor_.root_factor + numbers_.eps);
    if (decay_.weight_decay) d = d + numbers_.weight_decay * param;
    return d;
  }

 private:
  AdamWOptionScalars<T> numbers_;
  AdamWTensorScalars<T> of_tensor_;
  Decay decay_;
};

// What a loop needs of a direction, as Sgd says it.
struct AdamW {
  using Options = AdamWOptions;
  template <class T>
  using OptionScalars = AdamWOptionScalars<T>;
  template <class T>
  using TensorScalars = AdamWTensorScalars<T>;
  template <class T>
  using AnyDirection = AdamWDirection<T, RuntimeDecay>;

  static constexpr int kBuffers = 2;
  static constexpr bool kTensorScalarsTakeLong = true;
  static constexpr bool kCpuDecidesWhileRunning = true;  // beside a division and a root, a branch costs nothing

  template <class T>
  static CSGD_HOST_DEVICE AdamWOptionScalars<T> option_scalars(const AdamWOptions& options) {
    return {csgd::option_scalars<T>(options),    static_cast<T>(options.beta1),       static_cast<T>(options.beta2),
            static_cast<T>(1.0 - options.beta1), static_cast<T>(1.0 - options.beta2), static_cast<T>(options.eps)};
  }

  template <class T>
  static CSGD_HOST_DEVICE AdamWTensorScalars<T> tensor_scalars(const AdamWOptions& options, int64_t steps) {
    const auto t = static_cast<uint64_t>(steps) + 1;
    return {static_cast<T>(1.0 / (1.0 - power(options.beta1, t))),
            static_cast<T>(1.0 / square_root(1.0 - power(options.beta2, t)))};
  }

  template <class T, class F>
  static auto with_direction(const AdamWOptions& options, F f) {
    return options.weight_decay != 0 ? f(Tag<AdamWDirection<T, StaticDecay<true>>>{})
                                     : f(Tag<AdamWDirection<T, StaticDecay<false>>>{});
  }
};

}  // namespace csgd
