// SPDX-License-Identifier: Apache-2.0
// The direction of torch.optim.SGD. g is the gradient, unscaled and with the sign of a descent:
//     g <- g + weight_decay * x
//     m <- g in the first step, else momentum * m + (1 - dampening) * g
//     d  = g + momentum * m (Nesterov), m, or without momentum g
#pragma once

#include "update_rule.h"

namespace csgd {

// Which parts of the direction the options need. RuntimeParts decides while running, StaticParts while compiling.
struct RuntimeParts {
  bool weight_decay;
  bool momentum;
  bool nesterov;

  CSGD_HOST_DEVICE explicit RuntimeParts(const SgdOptions& options)
      : weight_decay(options.weight_decay != 0), momentum(options.momentum != 0), nesterov(options.nesterov) {}
};

template <bool kWeightDecay, bool kMomentum, bool kNesterov>
struct StaticParts {
  static constexpr bool weight_decay = kWeightDecay;
  static constexpr bool momentum = kMomentum;
  static constexpr bool nesterov = kNesterov;

  CSGD_HOST_DEVICE explicit StaticParts(const SgdOptions&) {}
};

template <class T>
struct SgdOptionScalars : OptionScalars<T> {
  T momentum;
  T one_minus_dampening;
};

template <class T>
struct SgdTensorScalars {
  bool first;  // the momentum buffer takes the gradient as it is
};

template <class T, class Parts>
class SgdDirection {
 public:
  CSGD_HOST_DEVICE SgdDirection(const SgdOptions& options, const SgdOptionScalars<T>& numbers,
                                SgdTensorScalars<T> of_tensor)
      : parts_(options),
        weight_decay_(numbers.weight_decay),
        momentum_(numbers.momentum),
        one_minus_dampening_(numbers.one_minus_dampening),
        first_(of_tensor.first) {}

  // Whether the buffers of the state are read and written.
  CSGD_HOST_DEVICE constexpr bool has_buffers() const { return parts_.momentum; }
  // Whether the parameter is read.
  CSGD_HOST_DEVICE constexpr bool reads_param() const { return parts_.weight_decay; }
  // Whether this step differs from later ones.
  CSGD_HOST_DEVICE bool is_first() const { return parts_.momentum && first_; }
  // The direction of later steps: where a loop has tested is_first() before, it need not do so for each element.
  CSGD_HOST_DEVICE SgdDirection of_later_steps() const {
    SgdDirection later = *this;
    later.first_ = false;
    return later;
  }

  // d; the buffers become the new ones, unrounded.
  template <class Value>
  CSGD_HOST_DEVICE Value operator()(Value grad, Value param, Value (&buffers)[1]) const {
    Value g = grad;
    if (parts_.weight_decay) g = g + weight_decay_ * param;
    if (!parts_.momentum) return g;
    Value& m = buffers[0];
    m = first_ ? g : momentum_ * m + one_minus_dampening_ * g;
    return parts_.nesterov ? g + momentum_ * m : m;
  }

 private:
  Parts parts_;
  T weight_decay_;
  T momentum_;
  T one_minus_dampening_;
  bool first_;
};

// What a loop needs of a direction.
struct Sgd {
  using Options = SgdOptions;
  template <class T>
  using OptionScalars = SgdOptionScalars<T>;
  template <class T>
  using TensorScalars = SgdTensorScalars<T>;
  // The class that decides while running.
  template <class T>
  using AnyDirection = SgdDirection<T, RuntimeParts>;

  static constexpr int kBuffers = 1;
  static constexpr bool kTensorScalarsTakeLong = false;  // on a GPU, for each thread to compute them
  static constexpr bool kCpuDecidesWhileRunning = false;

  template <class T>
  static CSGD_HOST_DEVICE SgdOptionScalars<T> option_scalars(const SgdOptions& options) {
    return {csgd::option_scalars<T>(options), static_cast<T>(options.momentum),
            static_cast<T>(options.one_minus_dampening)};
  }

  template <class T>
  static CSGD_HOST_DEVICE SgdTensorScalars<T> tensor_scalars(const SgdOptions& options, int64_t steps) {
    return {steps == 0 || options.fresh_momentum};
  }

  template <class T, class F>
  static auto with_direction(const SgdOptions& options, F f) {
    const RuntimeParts parts(options);
    if (parts.weight_decay) {
      if (!parts.momentum) return f(Tag<SgdDirection<T, StaticParts<true, false, false>>>{});
      return parts.nesterov ? f(Tag<SgdDirection<T, StaticParts<true, true, true>>>{})
                            : f(Tag<SgdDirection<T, StaticParts<true, true, false>>>{});
    }
    if (!parts.momentum) return f(Tag<SgdDirection<T, StaticParts<false, false, false>>>{});
    return parts.nesterov ? f(Tag<SgdDirection<T, StaticParts<false, true, true>>>{})
                          : f(Tag<SgdDirection<T, StaticParts<false, true, false>>>{});
  }
};

}  // namespace csgd
