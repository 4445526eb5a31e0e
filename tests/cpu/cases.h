// SPDX-License-Identifier: Apache-2.0
// Cases for the CPU loops: what they are run on, and the memory that they read and change. print_bits.cpp runs them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/core/philox.h"
#include "../../csrc/core/storage.h"

namespace cases {

// What an array holds at the start. Numbers are made from Philox, so that they are the same on every machine.
enum class Fill {
  kZeros,
  kEdge,    // numbers in [-1, 1], most of them small; every fourth is a special one: 0, -0, subnormal, Inf, NaN
  kAnyBits  // every bit pattern is as likely as any other. The largest one makes the bound so large that few move
};
struct NamedFill {
  const char* name;
  Fill fill;
};
constexpr NamedFill kFills[] = {{"edge", Fill::kEdge}, {"any", Fill::kAnyBits}};

// The arrays of a case.
class Memory {
 public:
  // The numbers of no two arrays of a case are the same.
  template <class S>
  S* make(const std::string& name, int64_t numel, Fill fill) {
    const auto index = static_cast<uint32_t>(arrays_.size());
    std::vector<unsigned char> bytes(static_cast<size_t>(numel) * sizeof(S));
    for (int64_t i = 0; fill != Fill::kZeros && i < numel; ++i) {
      const csgd::Philox4x32 random =
          csgd::draw_block(kSeed, csgd::kCalibrationStream, static_cast<uint64_t>(i), index, 0);
      const S value = fill == Fill::kEdge ? edge<S>(random) : any_bits<S>(random);
      std::memcpy(bytes.data() + static_cast<size_t>(i) * sizeof(S), &value, sizeof(S));
    }
    return add<S>(name, bytes);
  }

  // An array of these values.
  template <class S>
  S* hold(const std::string& name, const std::vector<S>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    return add<S>(name, {bytes, bytes + values.size() * sizeof(S)});
  }

  // A number of all bytes as they are now. Every NaN of float and double counts as the same, since processors differ in
  // its sign and payload.
  uint64_t digest() const;

  // Writes FOLDER/NAME.before and FOLDER/NAME.after for each array.
  void write(const std::string& folder) const;

 private:
  struct Array {
    std::string name;
    size_t float_size;  // of an element; 0 where it is neither float nor double
    std::vector<unsigned char> before, after;
  };

  static constexpr uint64_t kSeed = 0x9E3779B97F4A7C15u;

  template <class S>
  S* add(const std::string& name, const std::vector<unsigned char>& bytes) {
    arrays_.push_back({name, std::is_floating_point<S>::value ? sizeof(S) : 0, bytes, bytes});
    return reinterpret_cast<S*>(arrays_.back().after.data());
  }

  static double special(uint32_t which) {
    constexpr double kSpecial[] = {0.0,     -0.0,   0x1p-149, -0x1.8p-140, 0x1p-24, -0x1.8p-20,
                                   0x1p-14, 1e-310, -5e-324,  1.0,         -0.25};
    constexpr uint32_t kCount = sizeof(kSpecial) / sizeof(kSpecial[0]);
    if (which % (kCount + 3) < kCount) return kSpecial[which % (kCount + 3)];
    const int64_t infinity = csgd::FloatBits<double>::kInfinity;
    const int64_t bits[] = {infinity, infinity | INT64_MIN, infinity | infinity >> 1};
    return csgd::bit_cast<double>(bits[which % (kCount + 3) - kCount]);
  }

  template <class S>
  static S edge(const csgd::Philox4x32& random) {
    if constexpr (std::is_integral<S>::value) {
      return random.word[0] % 8 == 0 ? 0 : 1;  // a mask
    } else {
      const double uniform = static_cast<int32_t>(random.word[0]) * 0x1p-31;
      const double value = random.word[1] % 4 == 0 ? special(random.word[1] / 4) : uniform * uniform * uniform;
      return csgd::Storage<S>::store_nearest(static_cast<typename csgd::Storage<S>::Opmath>(value));
    }
  }
  template <class S>
  static S any_bits(const csgd::Philox4x32& random) {
    S value;
    std::memcpy(&value, random.word, sizeof(S));
    return value;
  }

  std::vector<Array> arrays_;
};

inline const char* name_of(csgd::DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// Takes a case: its name, of words with spaces between them that say all of its options, and the function that makes
// its arrays and runs it.
using Take = std::function<void(const std::string& name, const std::function<void(Memory&)>& run)>;

void steps(const Take& take);
void calibrated_gradients(const Take& take);
void thresholds(const Take& take);
void exchanges(const Take& take);

}  // namespace cases
