// SPDX-License-Identifier: Apache-2.0
// The loop of calibrate_grad over a range, in tiles. Like step_tile.h it is included once for each instruction set.
#include "calibrate_grad_cpu.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// Calls f(k, length, channel) for each run of the tile's elements k ... k + length - 1 that share a channel. Where each
// element has another channel than its neighbours (inner = 1), a run is one of consecutive channels from `channel` on.
template <class F>
static inline void for_each_run(const CalibrateGradCall& call, int64_t position, int64_t count, F f) {
  const bool consecutive = call.inner == 1;
  int64_t channel = position / call.inner % call.channels;
  int64_t length = consecutive ? call.channels - channel : call.inner - position % call.inner;
  for (int64_t k = 0; k < count;) {
    if (length > count - k) length = count - k;
    f(k, length, channel);
    k += length;
    channel = consecutive || channel + 1 == call.channels ? 0 : channel + 1;
    length = consecutive ? call.channels : call.inner;
  }
}

// The scale of each element of a tile, from those of the channels.
template <class T>
static inline void spread_scales(const CalibrateGradCall& call, int64_t position, int64_t count, const T* of_channel,
                                 T* scale) {
  for_each_run(call, position, count, [&](int64_t k, int64_t length, int64_t channel) {
    if (call.inner == 1) {
      memcpy(scale + k, of_channel + channel, static_cast<size_t>(length) * sizeof(T));
    } else {
      for (int64_t j = 0; j < length; ++j) scale[k + j] = of_channel[channel];
    }
  });
}

template <class Bits>
static inline void collect_largest(const CalibrateGradCall& call, int64_t position, int64_t count, const Bits* bits,
                                   int64_t* largest_bits) {
  for_each_run(call, position, count, [&](int64_t k, int64_t length, int64_t channel) {
    if (call.inner == 1) {
      for (int64_t j = 0; j < length; ++j) {
        if (largest_bits[channel + j] < bits[k + j]) largest_bits[channel + j] = bits[k + j];
      }
    } else {
      Bits largest = 0;
      for (int64_t j = 0; j < length; ++j) largest = largest < bits[k + j] ? bits[k + j] : largest;
      if (largest_bits[channel] < largest) largest_bits[channel] = largest;
    }
  });
}

// Calibrates one tile, all of which can be read and written. An element of scale 0 and d = 0, as in the padding, is not
// counted as passed on.
template <class S, bool kStochastic, bool kChannels>
static inline void calibrate_tile(const StreamDraws& moving, const StreamDraws& of_rounding, bool draw,
                                  int64_t position, int64_t count, const typename Storage<S>::Opmath* scale,
                                  const S* grad, S* out, LaneOf<Mask<S>>* bits, Totals<S>* totals) {
  using T = typename Storage<S>::Opmath;
  alignas(64) uint16_t draws[kTile], rounding[kTile];
  if (count == kTile) {
    for (int i = 0; i < kTile; i += kLine / static_cast<int>(sizeof(S))) {
      prefetch_ahead(grad + i);
      prefetch_ahead(out + i);
    }
  }
  if (draw) {
    moving.draw(position, static_cast<int>(count), draws);
    if (kStochastic) of_rounding.draw(position, static_cast<int>(count), rounding);
  } else {  // every draw is below n = 2^16, and rounding does not change a stored number
    memset(draws, 0, sizeof(draws));
    if (kStochastic) memset(rounding, 0, sizeof(rounding));
  }
  for (int i = 0; i < kTile; i += kLanes<S>) {
    const Values<S> d = load(grad + i);
    const Mask<S> d_bits = finite_magnitude_bits(d);
    if (kChannels) {
      d_bits.store(bits + i);
    } else {
      totals->largest_bits = greater(totals->largest_bits, d_bits);
    }
    const Values<S> n = moving_draws(d, Values<S>::load(scale + i));
    const Mask<S> move = moves(load_patterns<S>(draws + i), n);
    totals->moved = totals->moved + move;
    const Values<S> passed_on[] = {select(move, d * inverse_probability(n), Values<S>(T(0)))};
    store<S, kStochastic, false>(out + i, passed_on, rounding + i, nullptr, nullptr);
  }
}

template <class S, bool kStochastic, bool kChannels>
static int64_t calibrate_range(const CalibrateGradCall& call, const void* scales, int64_t begin, int64_t end,
                               int64_t* largest_bits) {
  using T = typename Storage<S>::Opmath;
  const T* of_channel = static_cast<const T*>(scales);
  const S* grad = static_cast<const S*>(call.grad);
  S* out = static_cast<S*>(call.out);
  const RoundKeys keys(call.seed);
  const uint32_t index = layer_index(call), step = static_cast<uint32_t>(*call.step);
  const StreamDraws moving(keys, call.seed, kGradStream, index, step, begin);
  const StreamDraws of_rounding(keys, call.seed, kGradRoundingStream, index, step, begin);
  bool draw = false;
  for (int64_t c = 0; c < call.channels; ++c) draw |= of_channel[c] < bit_cast<T>(FloatBits<T>::kInfinity);
  alignas(64) T scale[kTile];
  alignas(64) LaneOf<Mask<S>> bits[kTile];
  if (!kChannels) {
    for (int k = 0; k < kTile; ++k) scale[k] = of_channel[0];
  }
  int64_t moved = 0;
  Totals<S> totals{0, 0};
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t count = end - i < kTile ? end - i : kTile;
    if (kChannels) spread_scales(call, i, count, of_channel, scale);
    if (count == kTile) {
      calibrate_tile<S, kStochastic, kChannels>(moving, of_rounding, draw, i, count, scale, grad + i, out + i, bits,
                                                &totals);
    } else {  // in padded copies
      S padded_grad[kTile] = {}, padded_out[kTile];
      memcpy(padded_grad, grad + i, static_cast<size_t>(count) * sizeof(S));
      for (int64_t k = count; k < kTile; ++k) scale[k] = 0;
      calibrate_tile<S, kStochastic, kChannels>(moving, of_rounding, draw, i, count, scale, padded_grad, padded_out,
                                                bits, &totals);
      memcpy(out + i, padded_out, static_cast<size_t>(count) * sizeof(S));
    }
    if (kChannels) collect_largest(call, i, count, bits, largest_bits);
  }
  for (int k = 0; k < kLanes<S>; ++k) {
    moved -= totals.moved.raw[k];
    if (!kChannels && largest_bits[0] < totals.largest_bits.raw[k]) largest_bits[0] = totals.largest_bits.raw[k];
  }
  return moved;
}

template <class S, bool kStochastic>
static int64_t calibrate_range_channels(const CalibrateGradCall& call, const void* scales, int64_t begin, int64_t end,
                                        int64_t* largest_bits) {
  return call.channels == 1 ? calibrate_range<S, kStochastic, false>(call, scales, begin, end, largest_bits)
                            : calibrate_range<S, kStochastic, true>(call, scales, begin, end, largest_bits);
}

template <class S>
static int64_t calibrate_range_any(const CalibrateGradCall& call, const void* scales, int64_t begin, int64_t end,
                                   int64_t* largest_bits) {
  return Storage<S>::kRounds && call.stochastic_rounding
             ? calibrate_range_channels<S, Storage<S>::kRounds>(call, scales, begin, end, largest_bits)
             : calibrate_range_channels<S, false>(call, scales, begin, end, largest_bits);
}

CalibrateGradFunction calibrate_grad_function(DType dtype) {
  return with_storage(dtype, [](auto tag) -> CalibrateGradFunction { return calibrate_range_any<decltype(tag)>; });
}

}  // namespace CSGD_ISA
}  // namespace csgd
