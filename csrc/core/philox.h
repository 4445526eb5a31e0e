// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, and the random draws of Calibrated SGD made from it.
//
// J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// The generator is a pure function of (counter, key), so a draw depends on what it is for (seed, step,
// parameter, position, stream) and never on the thread, block, tile or process that asks for it.
#pragma once

#include "host_device.h"

namespace csgd {

struct Philox4x32 {
  uint32_t word[4];
};

// What a draw is used for. The three never share random bits.
enum Stream : uint32_t {
  kCalibrationStream = 0,  // does this coordinate move?
  kParamStream = 1,        // stochastic rounding of the parameter
  kMomentumStream = 2,     // stochastic rounding of the momentum buffer
};

constexpr int kDrawsPerCall = 8;     // 16-bit draws served by one Philox call
constexpr int kDrawRange = 1 << 16;  // a draw is an integer in [0, kDrawRange)

CSGD_HOST_DEVICE Philox4x32 philox4x32_10(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;  // the golden ratio
    key1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return {{c0, c1, c2, c3}};
}

// The Philox call that serves the elements 8 * block ... 8 * block + 7 of a parameter.
//   block  element position in memory order, divided by 8 (below 2^60)
//   index  position of the parameter over all param groups
//   step   low 32 bits of the number of steps applied to the parameter before this one
CSGD_HOST_DEVICE Philox4x32 draw_block(uint64_t seed, Stream stream, uint64_t block, uint32_t index, uint32_t step) {
  const Philox4x32 counter = {{static_cast<uint32_t>(block),
                               static_cast<uint32_t>(block >> 32) | (static_cast<uint32_t>(stream) << 28), index,
                               step}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The draw of the element at 8 * block + lane: words 0..3, first their low halves, then their high ones.
CSGD_HOST_DEVICE uint32_t draw_lane(const Philox4x32& bits, int lane) {
  const uint32_t word = bits.word[lane & 3];
  return (lane & 4) == 0 ? (word & 0xFFFFu) : (word >> 16);
}

}  // namespace csgd
