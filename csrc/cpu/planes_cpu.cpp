// SPDX-License-Identifier: Apache-2.0
#include "planes_cpu.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "exchange_cpu.h"

namespace csgd {
namespace {

constexpr int kByte = 8;   // bits
constexpr int kGroup = 4;  // sums that share a bit

int64_t bytes_of(int64_t bits) { return (bits + kByte - 1) / kByte; }

// Writes bits one after another, the first one lowest.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* to) : to_(to) {}

  // At most 32 bits.
  void put(uint32_t bits, int count) {
    waiting_ |= uint64_t{bits} << filled_;
    filled_ += count;
    if (filled_ < 32) return;
    for (int k = 0; k < 4; ++k) *to_++ = static_cast<uint8_t>(waiting_ >> (kByte * k));
    waiting_ >>= 32;
    filled_ -= 32;
  }

  // Writes what is left. Returns where it ends.
  uint8_t* finish() {
    for (; filled_ > 0; filled_ -= kByte, waiting_ >>= kByte) *to_++ = static_cast<uint8_t>(waiting_);
    return to_;
  }

 private:
  uint8_t* to_;
  uint64_t waiting_ = 0;
  int filled_ = 0;
};

// The planes of a message, one after another.
class PlaneReader {
 public:
  PlaneReader(const uint8_t* from, int64_t bytes) : from_(from), left_(bytes) {}

  // Goes on to a plane of so many bits; returns whether the message has it all.
  bool open(int64_t bits) {
    plane_ = from_;
    from_ += bytes_of(bits);
    left_ -= bytes_of(bits);
    return left_ >= 0;
  }

  uint32_t bit(int64_t i) const { return plane_[i / kByte] >> (i % kByte) & 1u; }
  // The bits 4 i ... 4 i + 3.
  uint32_t four(int64_t i) const { return plane_[i / 2] >> (i % 2 * kGroup) & 15u; }
  bool ended() const { return left_ == 0; }

 private:
  const uint8_t* from_;
  const uint8_t* plane_ = nullptr;
  int64_t left_;
};

template <class Digit>
int64_t write(const PlanesCall& call, uint8_t* to, int64_t limit) {
  const Digit* digits = static_cast<const Digit*>(call.digits);
  const auto most = static_cast<Digit>(call.most);
  const auto count = static_cast<size_t>(call.count);
  std::vector<uint8_t> occupied(count / 32 + 4), flags(count / kByte + 4), signs(count / kByte + 4);
  std::vector<Digit> sizes(count);
  BitWriter occupied_bits(occupied.data()), flag_bits(flags.data()), sign_bits(signs.data());
  size_t left = 0;  // number of sums that are not 0
  for (size_t i = 0; i < count; i += 2 * kGroup) {
    const size_t here = std::min(count - i, size_t{2 * kGroup});
    uint32_t mask = 0;
    for (size_t k = 0; k < here; ++k) mask |= uint32_t{digits[i + k] != most} << k;
    const uint32_t first = mask & 15u, second = mask >> kGroup;
    occupied_bits.put(uint32_t{first != 0} | uint32_t{second != 0} << 1, here > kGroup ? 2 : 1);
    if (first != 0) flag_bits.put(first, kGroup);
    if (second != 0) flag_bits.put(second, kGroup);
    for (; mask != 0; mask &= mask - 1) {
      const Digit digit = digits[i + static_cast<size_t>(std::countr_zero(mask))];
      sign_bits.put(digit > most ? 1 : 0, 1);
      sizes[left++] = static_cast<Digit>(digit > most ? digit - most : most - digit);
    }
  }
  int64_t bytes = 0;
  uint8_t* const ends[] = {occupied_bits.finish(), flag_bits.finish(), sign_bits.finish()};
  const uint8_t* const begins[] = {occupied.data(), flags.data(), signs.data()};
  for (int plane = 0; plane < 3; ++plane) bytes += ends[plane] - begins[plane];
  if (bytes >= limit) return limit;
  for (int plane = 0; plane < 3; ++plane) to = std::copy(begins[plane], static_cast<const uint8_t*>(ends[plane]), to);
  for (uint32_t size = 1; size < call.most && left > 0; ++size) {
    bytes += bytes_of(static_cast<int64_t>(left));
    if (bytes >= limit) return limit;
    BitWriter larger(to);
    size_t kept = 0;
    for (size_t i = 0; i < left; ++i) {
      const bool is_larger = sizes[i] > size;
      larger.put(is_larger ? 1 : 0, 1);
      sizes[kept] = sizes[i];
      kept += is_larger ? 1 : 0;
    }
    to = larger.finish();
    left = kept;
  }
  return bytes;
}

template <class Digit>
bool read(const PlanesCall& call, const uint8_t* from, int64_t bytes) {
  Digit* digits = static_cast<Digit*>(call.digits);
  const auto most = static_cast<Digit>(call.most);
  std::fill(digits, digits + call.count, most);
  PlaneReader reader(from, bytes);
  const int64_t groups = (call.count + kGroup - 1) / kGroup;
  if (!reader.open(groups)) return false;
  std::vector<int64_t> occupied;
  for (int64_t i = 0; i < groups; ++i) {
    if (reader.bit(i) != 0) occupied.push_back(i * kGroup);
  }
  if (!reader.open(static_cast<int64_t>(occupied.size()) * kGroup)) return false;
  std::vector<int64_t> places;  // of sums that are not 0
  for (size_t i = 0; i < occupied.size(); ++i) {
    for (uint32_t mask = reader.four(static_cast<int64_t>(i)); mask != 0; mask &= mask - 1) {
      const int64_t place = occupied[i] + std::countr_zero(mask);
      if (place < call.count) places.push_back(place);
    }
  }
  const auto found = static_cast<int64_t>(places.size());
  if (!reader.open(found)) return false;
  for (int64_t i = 0; i < found; ++i) {
    digits[places[static_cast<size_t>(i)]] = static_cast<Digit>(reader.bit(i) != 0 ? most + 1 : most - 1);
  }
  for (uint32_t size = 1; size < call.most && !places.empty(); ++size) {
    if (!reader.open(static_cast<int64_t>(places.size()))) return false;
    size_t kept = 0;
    for (size_t i = 0; i < places.size(); ++i) {
      if (reader.bit(static_cast<int64_t>(i)) == 0) continue;
      Digit& digit = digits[places[i]];
      digit = static_cast<Digit>(digit > most ? digit + 1 : digit - 1);
      places[kept++] = places[i];
    }
    places.resize(kept);
  }
  return reader.ended();
}

}  // namespace

int64_t write_planes(const PlanesCall& call, uint8_t* to, int64_t limit) {
  return digit_size(2 * call.most + 1) == 1 ? write<uint8_t>(call, to, limit) : write<uint32_t>(call, to, limit);
}

bool read_planes(const PlanesCall& call, const uint8_t* from, int64_t bytes) {
  return digit_size(2 * call.most + 1) == 1 ? read<uint8_t>(call, from, bytes) : read<uint32_t>(call, from, bytes);
}

}  // namespace csgd
