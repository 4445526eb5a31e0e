// SPDX-License-Identifier: Apache-2.0
// The loops of the exchange over a range. Like step_tile.h this is included once for each instruction set.
#include "exchange_cpu.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

constexpr int kWordLanes = CSGD_VECTOR_BYTES / 4;
constexpr int kDoubleLanes = CSGD_VECTOR_BYTES / 8;
using Doubles = Vector<double, kDoubleLanes>;

// Loads the first `count` lanes; the others are 0. `count` may be negative, or larger than the number of lanes.
template <class T, int kCount>
static inline Vector<T, kCount> load_some(const T* from, int64_t count) {
  if (count >= kCount) return Vector<T, kCount>::load(from);
  T some[kCount] = {};
  if (count > 0) memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
  return Vector<T, kCount>::load(some);
}

template <class T, int kCount>
static inline void store_some(Vector<T, kCount> values, T* to, int64_t count) {
  if (count >= kCount) return values.store(to);
  if (count > 0) memcpy(to, &values.raw, static_cast<size_t>(count) * sizeof(T));
}

// Converts words to doubles, and doubles that hold integers to integers. By their bits, since few processors have
// instructions for these conversions.
static inline Doubles words_as_doubles(Vector<uint32_t, kDoubleLanes> words) {
  const auto bits = convert<uint64_t>(words) | static_cast<uint64_t>(FloatBits<double>::kIntegers);
  return cast_bits<double>(bits) - integers<double>();
}

template <class T>
static inline Vector<T, kDoubleLanes> integers_of(Doubles values) {
  return convert<T>(cast_bits<uint64_t>(values + integers<double>()));
}

// Encodes one tile, all of which can be read and written.
template <class S>
static inline void encode_tile(const EncodeCall& call, const StreamDraws& stream, double bound, const CodeUnits& units,
                               int64_t position, const S* grad, uint8_t* codes) {
  alignas(64) uint16_t draws[kTile];
  for (int i = 0; i < kTile; i += kLine / static_cast<int>(sizeof(S))) prefetch_ahead(grad + i);
  stream.draw(position, kTile, draws);
  Mask<S> undecided(0);
  for (int i = 0; i < kTile; i += kLanes<S>) {
    const Values<S> g = load(grad + i);
    Mask<S> above, decided;
    const auto digit = own_digit(call, g, load_patterns<S>(draws + i));
    compare_in_float(units, cast_bits<float>(magnitude_bits(g)), draw_value<float>(digit), above, decided);
    undecided = undecided | (decided == Mask<S>(0));
    convert<uint8_t>(signed_code(g, above)).store(codes + i);
  }
  if (!any(undecided)) return;  // true for one coordinate in 2^15
  for (int i = 0; i < kTile; ++i) codes[i] = exact_code(call, bound, Storage<S>::load(grad[i]), position + i, draws[i]);
}

template <class S>
static void encode_range(const EncodeCall& call, int64_t begin, int64_t end) {
  const double bound = *call.bound;
  if (codes_are_zero(bound)) {
    memset(call.codes + begin, 1, static_cast<size_t>(end - begin));
    return;
  }
  const CodeUnits units = code_units(bound);
  const RoundKeys keys(call.seed);
  const StreamDraws stream(keys, call.seed, kExchangeStream, call.index, call.step, begin);
  const S* grad = static_cast<const S*>(call.grad);
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t count = end - i < kTile ? end - i : kTile;
    if (count == kTile) {
      encode_tile(call, stream, bound, units, i, grad + i, call.codes + i);
    } else {  // in padded copies
      S padded_grad[kTile] = {};
      uint8_t padded_codes[kTile];
      memcpy(padded_grad, grad + i, static_cast<size_t>(count) * sizeof(S));
      encode_tile(call, stream, bound, units, i, padded_grad, padded_codes);
      memcpy(call.codes + i, padded_codes, static_cast<size_t>(count));
    }
  }
}

// Packs the words begin ... end - 1 of one row.
template <class Digit>
static void pack_in_row(const PackCall& call, int64_t row, int64_t begin, int64_t end) {
  const Digit* digits = static_cast<const Digit*>(call.digits) + row * call.row;
  const int64_t left = call.numel - row * call.row, available = left < call.row ? left : call.row;
  uint32_t* words = call.words + row * call.words_per_row;
  for (int64_t w = begin; w < end; w += kWordLanes) {
    Vector<uint32_t, kWordLanes> value(0);
    for (int place = call.places - 1; place >= 0; --place) {
      const int64_t at = place * call.words_per_row + w;
      value = value * call.radix + convert<uint32_t>(load_some<Digit, kWordLanes>(digits + at, available - at));
    }
    store_some(value, words + w, end - w);
  }
}

template <class Digit>
static void pack_range(const PackCall& call, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / call.words_per_row, first = row * call.words_per_row;
    const int64_t stop = end < first + call.words_per_row ? end : first + call.words_per_row;
    pack_in_row<Digit>(call, row, begin - first, stop - first);
    begin = stop;
  }
}

static void pack_range_any(const PackCall& call, int64_t begin, int64_t end) {
  digit_size(call.radix) == 1 ? pack_range<uint8_t>(call, begin, end) : pack_range<uint32_t>(call, begin, end);
}

template <class Digit>
static void unpack_range(const UnpackCall& call, int64_t begin, int64_t end) {
  Digit* digits = static_cast<Digit*>(call.digits);
  const double radix = call.radix, inverse = 1.0 / radix;
  for (int64_t w = begin; w < end; w += kDoubleLanes) {
    Doubles word = words_as_doubles(load_some<uint32_t, kDoubleLanes>(call.words + w, end - w));
    for (int place = 0; place < call.places; ++place) {
      store_some(integers_of<Digit>(take_digit(word, radix, inverse)), digits + place * call.count + w, end - w);
    }
  }
}

static void unpack_range_any(const UnpackCall& call, int64_t begin, int64_t end) {
  digit_size(call.radix) == 1 ? unpack_range<uint8_t>(call, begin, end) : unpack_range<uint32_t>(call, begin, end);
}

template <class Sum>
static void add_range(const AddCall& call, int64_t begin, int64_t end) {
  constexpr double kRadix = kCodeRadix;
  Sum* sums = static_cast<Sum*>(const_cast<void*>(call.sums.digits));
  for (int64_t w = begin; w < end; w += kDoubleLanes) {
    Doubles totals[kCodesPerWord] = {};
    for (int64_t rank = 0; rank < call.ranks; ++rank) {
      const uint32_t* words = call.codes + rank * call.code_words;
      Doubles word = words_as_doubles(load_some<uint32_t, kDoubleLanes>(words + w, end - w));
      for (int place = 0; place < kCodesPerWord; ++place) {
        totals[place] = totals[place] + take_digit(word, kRadix, 1.0 / kRadix);
      }
    }
    for (int place = 0; place < kCodesPerWord; ++place) {
      const int64_t at = place * call.code_words + w, left = call.sums.row - at;
      store_some(integers_of<Sum>(totals[place]), sums + at, left < end - w ? left : end - w);
    }
  }
}

static void add_range_any(const AddCall& call, int64_t begin, int64_t end) {
  digit_size(call.sums.radix) == 1 ? add_range<uint8_t>(call, begin, end) : add_range<uint32_t>(call, begin, end);
}

// Decodes one tile of sums that lie in the same place of consecutive words. All of the tile can be read and written.
template <class S>
static inline void decode_tile(const DecodeCall& call, double unit, double inverse, double inverse_radix,
                               const uint32_t* words, S* grad) {
  alignas(64) float values[kTile];
  const double radix = call.radix, ranks = static_cast<double>(call.ranks);
  for (int i = 0; i < kTile; i += kDoubleLanes) {
    Doubles word = divided(words_as_doubles(Vector<uint32_t, kDoubleLanes>::load(words + i)), inverse);
    const Doubles value = (take_digit(word, radix, inverse_radix) - ranks) * unit;
    convert<float>(value).store(values + i);
  }
  for (int i = 0; i < kTile; i += kLanes<S>) {
    const Values<S> decoded[] = {Values<S>::load(values + i)};
    store<S, false, false>(grad + i, decoded, nullptr, nullptr, nullptr);
  }
}

template <class S>
static void decode_range(const DecodeCall& call, int64_t begin, int64_t end) {
  const double unit = *call.unit;
  double inverse[kMostPlaces];
  for (int place = 0; place < kMostPlaces; ++place) inverse[place] = inverse_power(call.radix, place);
  S* grad = static_cast<S*>(call.grad);
  for (int64_t i = begin; i < end;) {
    const SumPlace at = sum_place(call, call.first + i);
    int64_t count = end - i < kTile ? end - i : kTile;
    if (at.left < count) count = at.left;
    if (count == kTile) {
      decode_tile(call, unit, inverse[at.place], inverse[1], call.words + at.word, grad + i);
    } else {  // in padded copies
      uint32_t padded_words[kTile] = {};
      S padded_grad[kTile];
      memcpy(padded_words, call.words + at.word, static_cast<size_t>(count) * sizeof(uint32_t));
      decode_tile(call, unit, inverse[at.place], inverse[1], padded_words, padded_grad);
      memcpy(grad + i, padded_grad, static_cast<size_t>(count) * sizeof(S));
    }
    i += count;
  }
}

static void encode_range_any(DType dtype, const EncodeCall& call, int64_t begin, int64_t end) {
  with_coded_storage(dtype, [&](auto tag) { encode_range<decltype(tag)>(call, begin, end); });
}

static void decode_range_any(DType dtype, const DecodeCall& call, int64_t begin, int64_t end) {
  with_coded_storage(dtype, [&](auto tag) { decode_range<decltype(tag)>(call, begin, end); });
}

ExchangeLoops exchange_loops() {
  return {encode_range_any, pack_range_any, unpack_range_any, add_range_any, decode_range_any};
}

}  // namespace CSGD_ISA
}  // namespace csgd
