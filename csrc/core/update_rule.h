// SPDX-License-Identifier: Apache-2.0
// The update rule of the calibrated optimizers, element by element. docs/algorithm.md derives it.
//
// With d the direction of the plain optimizer (sgd.h, adamw.h), T = c * l the calibrated Lipschitz bound and r a 16-bit
// draw:
//     n  = min(ceil(|d| * 2^16 / T), 2^16)        n / 2^16 is the probability to move
//     x' = x - lr * d * (2^16 / n)  if r < n,  else x' = x
// so that the mean of x' over all draws is exactly x - lr * d.
//
// Every multiplication, addition and division is rounded on its own. Compile with -ffp-contract=off (host) and
// -fmad=false (nvcc), never with fast-math; otherwise the backends differ in bits.
#pragma once

#include <cmath>

#include "params.h"
#include "philox.h"
#include "storage.h"

namespace csgd {

// The numbers among the options, each rounded once to opmath.
template <class T>
struct OptionScalars {
  T lr;  // unless the learning rate is a tensor
  T weight_decay;
  T calibration;
  T lipschitz;
};

template <class T>
CSGD_HOST_DEVICE OptionScalars<T> option_scalars(const StepOptions& options) {
  return {static_cast<T>(options.lr), static_cast<T>(options.weight_decay), static_cast<T>(options.calibration),
          static_cast<T>(options.lipschitz)};
}

// The scalars of one tensor in one step, in opmath.
template <class T>
struct StepScalars {
  T lr;
  T grad_factor;  // undoes the loss scale, and turns the sign to maximize; exact when it is 1 or -1
  T scale;        // calibration_scale()
  uint32_t step;  // low 32 bits of the steps applied before this one
};

// GradScaler's flag is a sum over devices. So any value but 0, for instance 2.0, means that this step must not happen.
CSGD_HOST_DEVICE bool overflowed(const StepOptions& options) {
  return options.found_inf != nullptr && *options.found_inf != 0.0f;
}

// 2^16 / T for T = c * l; Inf when T = 0, which makes every coordinate move.
template <class T>
CSGD_HOST_DEVICE T calibration_scale(T calibration, T lipschitz) {
  const T bound = calibration * lipschitz;
  return bound > T(0) ? T(kDrawRange) / bound : bit_cast<T>(FloatBits<T>::kInfinity);
}

// `numbers` is option_scalars(options).
template <class T>
CSGD_HOST_DEVICE StepScalars<T> step_scalars(const StepOptions& options, const OptionScalars<T>& numbers,
                                             const StepTensor& tensor) {
  StepScalars<T> s;
  s.lr = numbers.lr;
  if (options.lr_float32 != nullptr) {
    s.lr = static_cast<T>(*options.lr_float32);
  } else if (options.lr_float64 != nullptr) {
    s.lr = static_cast<T>(*options.lr_float64);
  }
  const T unscale = options.grad_scale == nullptr ? T(1) : T(1) / static_cast<T>(*options.grad_scale);
  s.grad_factor = options.maximize ? -unscale : unscale;
  s.scale = calibration_scale(numbers.calibration,
                              tensor.bound != nullptr ? *static_cast<const T*>(tensor.bound) : numbers.lipschitz);
  s.step = static_cast<uint32_t>(*tensor.step);
  return s;
}

// A class as an argument of a function.
template <class T>
struct Tag {
  using Type = T;
};

// Calls f with the Tag of the direction class for these options. Rule: Sgd or AdamW.
template <class Rule, class T, class F>
auto with_direction(const typename Rule::Options& options, F f) {
  return Rule::template with_direction<T>(options, f);
}

// From here on Value is T or, on a CPU, a vector of T.

// The bits of |value| as an integer. Non-negative floats have the same order as their bits.
template <class Value>
CSGD_HOST_DEVICE auto magnitude_bits(Value value) {
  using Bits = FloatBits<LaneOf<Value>>;
  return cast_bits<typename Bits::Type>(value) & Bits::kMagnitude;
}

template <class Value>
CSGD_HOST_DEVICE Value magnitude(Value value) {
#if defined(__CUDA_ARCH__)
  return fabs(value);  // a modifier of other instructions, which costs nothing
#else
  return cast_bits<LaneOf<Value>>(magnitude_bits(value));
#endif
}

// The bits of |d| as an integer, 0 for NaN and Inf. The maximum of these is max |d|, and may be taken in any order.
template <class Value>
CSGD_HOST_DEVICE auto finite_magnitude_bits(Value d) {
  using Bits = FloatBits<LaneOf<Value>>;
  const auto bits = magnitude_bits(d);
  return select(bits < Bits::kInfinity, bits, typename Bits::Type(0));
}

// The bits of |d| plus kAboveInfinity as an integer: in the order of |d|, but negative for NaN and Inf.
template <class Value>
CSGD_HOST_DEVICE auto ordered_bits(Value d) {
  using Bits = FloatBits<LaneOf<Value>>;
  using Unsigned = typename BitsOfSize<sizeof(LaneOf<Value>)>::Type;
  return cast_bits<typename Bits::Type>(cast_bits<Unsigned>(magnitude_bits(d)) + Unsigned(Bits::kAboveInfinity));
}

// x = |d| * 2^16 / T, at most 2^16; n is the smallest integer >= x. A product that is not below 2^16, NaN included,
// gives 2^16, and such a d is applied as it is. `scale` is one number for all of d, or one for each.
template <class Value, class Scale>
CSGD_HOST_DEVICE Value limited_product(Value d, Scale scale) {
  return lesser(magnitude(d) * scale, Value(LaneOf<Value>(kDrawRange)));
}

// The product of a d that is not 0 can underflow to 0 only if the scale is below 1. Then x is at least least_product(),
// which is above 0, so that n is not 0 either.
template <class T>
CSGD_HOST_DEVICE bool may_underflow(T scale) {
  return scale < T(1);
}

template <class Value>
CSGD_HOST_DEVICE Value least_product(Value d) {
  return lesser(magnitude(d), Value(LaneOf<Value>(0x1p-100)));
}

// x, whatever the scale.
template <class Value, class Scale>
CSGD_HOST_DEVICE Value guarded_product(Value d, Scale scale) {
  return larger(limited_product(d, scale), least_product(d));
}

// n, the number of draws out of 2^16 that move the coordinate: an integer in the type Value.
template <class Value, class Scale>
CSGD_HOST_DEVICE Value moving_draws(Value d, Scale scale) {
  return round_up(guarded_product(d, scale));
}

// The same for a caller that has x already, unlimited.
template <class Value>
CSGD_HOST_DEVICE Value moving_draws_of(Value x) {
  return round_up(lesser(x, Value(LaneOf<Value>(kDrawRange))));
}

// A draw as T or as a vector of T.
template <class T, class Draw>
CSGD_HOST_DEVICE auto draw_value(Draw draw) {
  using Bits = FloatBits<T>;
  return cast_bits<T>(convert<typename Bits::Type>(draw) | Bits::kIntegers) - integers<T>();
}

// Whether the draw is below n.
template <class Value, class Draw>
CSGD_HOST_DEVICE auto moves(Draw draw, Value n) {
  return draw_value<LaneOf<Value>>(draw) < n;
}

// Whether the draw is not below n, for x = |d| * 2^16 / T of which n = min(ceil(x), 2^16). A draw is an integer below
// 2^16, so it need not be rounded up nor limited. If x is NaN, all draws are below n.
template <class Value, class Draw>
CSGD_HOST_DEVICE auto stays(Draw draw, Value x) {
  return x <= convert<LaneOf<Value>>(cast_bits<int32_t>(draw));
}

// 1 / x, correctly rounded, from an estimate that is within 2 units in the last place, for x = n or n / 2^16 with n = 1
// ... 2^16: one Newton step with fused multiply-adds (Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", 1990). tests/rule/test_quotient.py tries all n with all such estimates; a factor that is a
// power of two changes nothing.
CSGD_HOST_DEVICE float refine_reciprocal(float x, float estimate) {
  return fmaf(estimate, fmaf(-x, estimate, 1.0f), estimate);
}

// 2^16 / n, correctly rounded.
template <class Value>
CSGD_HOST_DEVICE Value inverse_probability(Value n) {
  return LaneOf<Value>(kDrawRange) / n;
}

// 2^16 / n, correctly rounded, given integers() + n. A GPU divides in software. That takes three times as long as
// refining its own estimate of the reciprocal, which is within 1 unit in the last place (PTX ISA, rcp.approx.ftz.f32).
template <class T>
CSGD_HOST_DEVICE T inverse_probability_above(T above) {
  return inverse_probability(above - integers<T>());
}
#if defined(__CUDA_ARCH__)
template <>
CSGD_HOST_DEVICE float inverse_probability_above(float above) {
  const float probability = fmaf(above, 0x1p-16f, -0x1p7f);  // n / 2^16, exactly
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(probability));
  return refine_reciprocal(probability, estimate);
}
#endif

// The word of the Philox counter that makes the draws of one layer's gradient in one process differ from all others.
CSGD_HOST_DEVICE uint32_t layer_index(const CalibrateGradCall& call) {
  return static_cast<uint32_t>(*call.index) + (call.rank << 16);
}

// By what a coordinate that moves becomes smaller. `estimate` is d * 2^16 / n, of which d is the mean over all draws.
template <class T, class Value>
CSGD_HOST_DEVICE Value change_of(T lr, Value estimate) {
  return lr * estimate;
}

// The bound for the next step. `largest` is the largest finite |d|.
template <class T>
CSGD_HOST_DEVICE T next_bound(double bound_decay, T bound, T largest) {
  const T decayed = static_cast<T>(bound_decay) * bound;
  return decayed < largest ? largest : decayed;
}

// After all elements: sets the bound and the step for the next step, and the tally.
template <class T>
CSGD_HOST_DEVICE void advance(const StepOptions& options, const StepTensor& tensor, T largest, int64_t moved) {
  if (tensor.bound != nullptr) {
    T* bound = static_cast<T*>(tensor.bound);
    *bound = next_bound(options.bound_decay, *bound, largest);
  }
  *tensor.step += 1;
  if (tensor.tally != nullptr) tensor.tally->moved = moved;
}

}  // namespace csgd
