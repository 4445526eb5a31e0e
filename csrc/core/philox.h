// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, and the random draws of Calibrated SGD that are made from it.
//
// J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
// generator is a pure function of (counter, key). So a draw depends on its purpose (seed, step, parameter, position,
// stream) and never on the thread, block, tile or process that makes it.
#pragma once

#include "host_device.h"

namespace csgd {

// Four words. Each is a uint32_t, or several side by side: a type with operator^ for two of its own kind and for one
// and a uint32_t, and with a multiply() like the one below. Vector units process as many counters at a time as they
// have lanes (csrc/cpu/words_*.h).
template <class Word>
struct PhiloxWords {
  Word word[4];
};
using Philox4x32 = PhiloxWords<uint32_t>;

// The purpose of a draw. Draws of different streams never share random bits.
enum Stream : uint32_t {
  kCalibrationStream = 0,   // does this coordinate move?
  kParamStream = 1,         // stochastic rounding of the parameter
  kMomentumStream = 2,      // stochastic rounding of the momentum buffer, and of AdamW's mean of the gradients
  kGradStream = 3,          // a layer's calibration of a gradient: is this coordinate passed on?
  kGradRoundingStream = 4,  // stochastic rounding of a calibrated gradient
  kExchangeStream = 5,      // the code of a gradient that goes to other processes
  kSecondMomentStream = 6,  // stochastic rounding of AdamW's mean of the squares
};

// The stream of a direction's buffer.
CSGD_HOST_DEVICE constexpr Stream buffer_stream(int buffer) {
  return buffer == 0 ? kMomentumStream : kSecondMomentStream;
}

constexpr int kDrawsPerCall = 8;     // 16-bit draws served by one Philox call
constexpr int kDrawRange = 1 << 16;  // a draw is an integer in [0, kDrawRange)

CSGD_HOST_DEVICE void multiply(uint32_t factor, uint32_t word, uint32_t* high, uint32_t* low) {
#if defined(__CUDA_ARCH__)
  *high = __umulhi(factor, word);  // nvcc makes one multiplication of the two; the code below adds once more
  *low = factor * word;
#else
  const uint64_t product = uint64_t{factor} * word;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
#endif
}

constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;

// One of the two key words of a round: the low or high half of the seed, to which each round adds a Weyl constant.
CSGD_HOST_DEVICE uint32_t round_key(uint64_t seed, int round, int half) {
  constexpr uint32_t kGoldenRatio = 0x9E3779B9u, kSquareRootOf3Less1 = 0xBB67AE85u;
  return static_cast<uint32_t>(seed >> (32 * half)) +
         static_cast<uint32_t>(round) * (half == 0 ? kGoldenRatio : kSquareRootOf3Less1);
}

// The key words of all rounds. A caller that makes many draws computes them once instead of in every call.
struct PhiloxRoundKeys {
  uint32_t word[10][2];
};

CSGD_HOST_DEVICE uint32_t round_key(const PhiloxRoundKeys& keys, int round, int half) { return keys.word[round][half]; }

inline PhiloxRoundKeys philox_round_keys(uint64_t seed) {
  PhiloxRoundKeys keys;
  for (int round = 0; round < 10; ++round) {
    for (int half = 0; half < 2; ++half) keys.word[round][half] = round_key(seed, round, half);
  }
  return keys;
}

// The rounds from `first` on. Key: a seed, or the round keys of a seed.
template <class Word, class Key>
CSGD_HOST_DEVICE PhiloxWords<Word> philox_rounds_from(int first, PhiloxWords<Word> counter, const Key& key) {
  Word c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = first; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(kPhiloxFactor0, c0, &high0, &low0);
    multiply(kPhiloxFactor1, c2, &high1, &low1);
    c0 = high1 ^ c1 ^ round_key(key, round, 0);
    c1 = low1;
    c2 = high0 ^ c3 ^ round_key(key, round, 1);
    c3 = low0;
  }
  return {{c0, c1, c2, c3}};
}

template <class Word, class Key>
CSGD_HOST_DEVICE PhiloxWords<Word> philox4x32_10(PhiloxWords<Word> counter, const Key& key) {
  return philox_rounds_from(0, counter, key);
}

// For counters that differ in their first word only: what of the first three rounds is the same for all of them, for
// after_three_rounds().
inline Philox4x32 philox_series(uint32_t second, uint32_t third, uint32_t fourth, uint64_t seed) {
  uint32_t high0, low0, high1, low1;
  multiply(kPhiloxFactor1, third, &high1, &low1);
  multiply(kPhiloxFactor0, high1 ^ second ^ round_key(seed, 0, 0), &high0, &low0);
  return {{fourth ^ round_key(seed, 0, 1), low1 ^ round_key(seed, 1, 0), high0 ^ round_key(seed, 1, 1),
           low0 ^ round_key(seed, 2, 1)}};
}

// The counter of a series with this first word, after three rounds.
template <class Word, class Key>
CSGD_HOST_DEVICE PhiloxWords<Word> after_three_rounds(const PhiloxWords<Word>& series, Word first, const Key& key) {
  Word high0, low0, high1, low1;
  multiply(kPhiloxFactor0, first, &high0, &low0);
  multiply(kPhiloxFactor1, high0 ^ series.word[0], &high1, &low1);
  const Word c0 = high1 ^ series.word[1], c1 = low1, c2 = low0 ^ series.word[2];
  multiply(kPhiloxFactor0, c0, &high0, &low0);
  multiply(kPhiloxFactor1, c2, &high1, &low1);
  return {{high1 ^ c1 ^ round_key(key, 2, 0), low1, high0 ^ series.word[3], low0}};
}

// The second word of a draw's counter, from the number of its block, which is below 2^60.
CSGD_HOST_DEVICE uint32_t second_word(Stream stream, uint64_t block) {
  return static_cast<uint32_t>(block >> 32) | (static_cast<uint32_t>(stream) << 28);
}

// The Philox call that serves the elements 8 * block ... 8 * block + 7 of a parameter. The counter is made from
//   block  element position in memory order, divided by 8 (below 2^60): low and high 32 bits
//   index  position of the parameter over all param groups
//   step   low 32 bits of the number of steps applied to the parameter before this one
template <class Key>
CSGD_HOST_DEVICE Philox4x32 draw_block(const Key& key, Stream stream, uint64_t block, uint32_t index, uint32_t step) {
  const Philox4x32 counter = {{static_cast<uint32_t>(block), second_word(stream, block), index, step}};
  return philox4x32_10(counter, key);
}

// The draw of the element at 8 * block + lane: lanes 0 ... 3 have the low halves of words 0 ... 3, lanes 4 ... 7 the
// high halves.
CSGD_HOST_DEVICE uint32_t draw_lane(const Philox4x32& bits, int lane) {
  const uint32_t word = bits.word[lane & 3];
  return (lane & 4) == 0 ? (word & 0xFFFFu) : (word >> 16);
}

}  // namespace csgd
