// SPDX-License-Identifier: Apache-2.0
// What happens before and after the loop of calibrate_grad: the scales before it, the bounds after it.
#include "calibrate_grad_cpu.h"

#include "../core/update_rule.h"

namespace csgd {
namespace {

template <class T>
T bound_of(const CalibrateGradCall& call, int64_t channel) {
  return static_cast<T>(call.bounds != nullptr ? call.bounds[channel] : call.lipschitz);
}

template <class T>
void write_scales(const CalibrateGradCall& call, T* scales) {
  for (int64_t c = 0; c < call.channels; ++c)
    scales[c] = calibration_scale(static_cast<T>(call.calibration), bound_of<T>(call, c));
}

template <class T>
void advance_bounds(const CalibrateGradCall& call, const int64_t* largest_bits) {
  for (int64_t c = 0; c < call.channels; ++c) {
    const T largest = bit_cast<T>(static_cast<typename FloatBits<T>::Type>(largest_bits[c]));
    call.bounds[c] = static_cast<double>(next_bound(call.bound_decay, bound_of<T>(call, c), largest));
  }
}

}  // namespace

void calibrate_grad_scales(DType dtype, const CalibrateGradCall& call, void* scales) {
  with_storage(dtype, [&](auto tag) {
    using T = typename Storage<decltype(tag)>::Opmath;
    write_scales(call, static_cast<T*>(scales));
  });
}

void calibrate_grad_finish(DType dtype, const CalibrateGradCall& call, int64_t moved, const int64_t* largest_bits) {
  if (call.bounds != nullptr) {
    with_storage(dtype, [&](auto tag) { advance_bounds<typename Storage<decltype(tag)>::Opmath>(call, largest_bits); });
  }
  *call.step += 1;
  if (call.tally == nullptr) return;
  call.tally->moved = moved;
  call.tally->numel = call.numel;
}

}  // namespace csgd
