// SPDX-License-Identifier: Apache-2.0
// The calibration of gradients, and their exchange as codes.
#include "../../csrc/cpu/calibrate_grad_cpu.h"
#include "../../csrc/cpu/exchange_cpu.h"
#include "cases.h"

namespace cases {
namespace {

using namespace csgd;

constexpr uint64_t kSeed = 0xFEDCBA9876543210u;
constexpr int64_t kChannels = 20;
constexpr int64_t kGradNumel = kChannels * 7 * 17;

// How a gradient is calibrated. `inner`: 0 for one bound; where c is not 0 a bound is 0 in the first of the two calls.
struct GradCalibration {
  const char* name;
  int64_t inner;
  double calibration;
  double lipschitz;
};
constexpr GradCalibration kGradCalibrations[] = {
    {"one c=0", 0, 0, 0},         {"one c=0.3", 0, 0.3, 0},     {"one l=1e6", 0, 1, 1e6},
    {"inner=1 c=0.3", 1, 0.3, 0}, {"inner=7 c=0.3", 7, 0.3, 0},
};

template <class S>
void calibrate(DType dtype, CalibrateGradCall call, Fill fill, Memory& memory) {
  call.grad = memory.make<S>("grad", kGradNumel, fill);
  call.index = memory.hold<int64_t>("index", {7});
  call.step = memory.make<int64_t>("step", 1, Fill::kZeros);
  if (call.lipschitz == 0) call.bounds = memory.make<double>("bounds", call.channels, Fill::kZeros);
  call.tally = reinterpret_cast<CalibrationTally*>(memory.make<int64_t>("tally", 4 + call.channels, Fill::kZeros));
  call.numel = kGradNumel;
  for (const char* name : {"out0", "out1"}) {
    call.out = memory.make<S>(name, kGradNumel, Fill::kZeros);
    std::vector<double> scales(static_cast<size_t>(call.channels));
    std::vector<int64_t> largest_bits(static_cast<size_t>(call.channels), 0);
    calibrate_grad_scales(dtype, call, scales.data());
    const int64_t moved = calibrate_grad_function(dtype)(call, scales.data(), 0, kGradNumel, largest_bits.data());
    calibrate_grad_finish(dtype, call, moved, largest_bits.data());
  }
}

// From here on the exchange. csrc/ops/exchange.cpp lays words out in the same way.

constexpr int64_t kCodedNumel = 2048 + 77;

int digits_per_word(uint64_t radix) {
  int count = 0;
  for (uint64_t power = radix; power <= uint64_t{1} << 32; power *= radix) ++count;
  return count;
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bound T. With "tiny" all coordinates are decided by the long division.
struct Bound {
  const char* name;
  double value;
};
constexpr Bound kBounds[] = {{"one", 1}, {"third", 0x1.555556p-2}, {"tiny", 0x1p-140}, {"huge", 0x1.fffffep127}};

// Every rank encodes a gradient and packs its codes for all ranks; each rank adds up those of its shard; decoded are
// the sums of all shards.
template <class S>
void exchange(DType dtype, int64_t ranks, double bound, Fill fill, Memory& memory) {
  const ExchangeLoops loops = exchange_loops();
  const int64_t code_words = ceil_divide(kCodedNumel, ranks * kCodesPerWord), shard = code_words * kCodesPerWord;
  const auto radix = static_cast<uint32_t>(2 * ranks + 1);
  const int64_t sum_words = ceil_divide(shard, digits_per_word(radix));
  const double* bounds = memory.hold<double>("bound", {bound, bound / static_cast<double>(ranks)});
  const S* grad = memory.make<S>("grad", kCodedNumel, fill);
  uint8_t* codes = memory.make<uint8_t>("codes", ranks * kCodedNumel, Fill::kZeros);
  uint32_t* words = memory.make<uint32_t>("words", ranks * ranks * code_words, Fill::kZeros);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    EncodeCall encode{};
    encode.grad = grad;
    encode.codes = codes + rank * kCodedNumel;
    encode.bound = bounds;
    encode.numel = kCodedNumel;
    encode.seed = kSeed;
    encode.index = static_cast<uint32_t>(rank / 2);
    encode.step = 5;
    encode.antithetic = rank % 2 == 1 ? kAllDraws : 0;
    loops.encode(dtype, encode, 0, kCodedNumel);
    PackCall pack{};
    pack.digits = encode.codes;
    pack.words = words + rank * ranks * code_words;
    pack.numel = kCodedNumel;
    pack.row = shard;
    pack.words_per_row = code_words;
    pack.rows = ranks;
    pack.radix = kCodeRadix;
    pack.places = kCodesPerWord;
    loops.pack(pack, 0, ranks * code_words);
  }
  uint32_t* own = memory.make<uint32_t>("own", ranks * code_words, Fill::kZeros);
  uint32_t* digits = memory.make<uint32_t>("digits", shard, Fill::kZeros);
  uint32_t* sums = memory.make<uint32_t>("sums", ranks * sum_words, Fill::kZeros);
  for (int64_t to = 0; to < ranks; ++to) {
    for (int64_t from = 0; from < ranks; ++from) {
      std::memcpy(own + from * code_words, words + (from * ranks + to) * code_words,
                  static_cast<size_t>(code_words) * sizeof(uint32_t));
    }
    AddCall add{};
    add.codes = own;
    add.code_words = code_words;
    add.ranks = ranks;
    add.sums = {digits, sums + to * sum_words, shard, shard, sum_words, 1, radix, digits_per_word(radix)};
    loops.add(add, 0, code_words);
    loops.pack(add.sums, 0, sum_words);
  }
  DecodeCall decode{};
  decode.words = sums;
  decode.unit = bounds + 1;
  decode.grad = memory.make<S>("decoded", kCodedNumel, Fill::kZeros);
  decode.numel = kCodedNumel;
  decode.shard = shard;
  decode.words_per_shard = sum_words;
  decode.ranks = ranks;
  decode.radix = radix;
  loops.decode(dtype, decode, 0, kCodedNumel);
}

}  // namespace

void calibrated_gradients(const Take& take) {
  for (const DType dtype : kDTypes)
    for (const char* rounding : {"stochastic", "nearest"})
      for (const GradCalibration& calibration : kGradCalibrations)
        for (const NamedFill& fill : kFills) {
          std::string name = "calibrate_grad";
          for (const char* word : {name_of(dtype), rounding, calibration.name, fill.name}) (name += ' ') += word;
          take(name, [&](Memory& memory) {
            CalibrateGradCall call{};
            call.channels = calibration.inner == 0 ? 1 : kChannels;
            call.inner = calibration.inner == 0 ? 1 : calibration.inner;
            call.calibration = calibration.calibration;
            call.lipschitz = calibration.lipschitz;
            call.bound_decay = 0.99;
            call.seed = kSeed;
            call.stochastic_rounding = rounding[0] == 's';
            call.rank = 3;
            with_storage(dtype, [&](auto tag) { calibrate<decltype(tag)>(dtype, call, fill.fill, memory); });
          });
        }
}

void exchanges(const Take& take) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const int64_t ranks : {3, 130})  // sums of 130 codes take digits of 32 bits
      for (const Bound& bound : kBounds)
        for (const NamedFill& fill : kFills) {
          std::string name = std::string("exchange ") + name_of(dtype) + ' ' + std::to_string(ranks);
          for (const char* word : {bound.name, fill.name}) (name += ' ') += word;
          take(name, [&](Memory& memory) {
            with_coded_storage(dtype, [&](auto tag) {
              exchange<decltype(tag)>(dtype, ranks, bound.value, fill.fill, memory);
              return 0;
            });
          });
        }
}

}  // namespace cases
