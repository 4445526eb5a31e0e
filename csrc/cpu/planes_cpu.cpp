// SPDX-License-Identifier: Apache-2.0
#include "planes_cpu.h"

#include <algorithm>
#include <bitset>
#include <vector>

#include "exchange_cpu.h"

namespace csgd {
namespace {

constexpr int kByte = 8;   // bits
constexpr int kGroup = 4;  // sums that share a bit

int64_t bytes_of(int64_t bits) { return (bits + kByte - 1) / kByte; }

// Writes a plane of flags that are 0 or 1, the first one in the lowest bit. Returns where it ends.
uint8_t* write_flags(const uint8_t* flags, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += kByte) {
    const int64_t here = std::min(count - i, int64_t{kByte});
    uint32_t byte = 0;
    for (int64_t k = 0; k < here; ++k) byte |= uint32_t{flags[i + k]} << k;
    *to++ = static_cast<uint8_t>(byte);
  }
  return to;
}

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
  const uint8_t* plane() const { return plane_; }
  bool ended() const { return left_ == 0; }

 private:
  const uint8_t* from_;
  const uint8_t* plane_ = nullptr;
  int64_t left_;
};

// The loops below have no branches that depend on a sum: it is written in any case, and the place of the next one moves
// on only where the sum is one of those that are picked.

template <class Digit>
int64_t write(const PlanesCall& call, uint8_t* to, int64_t limit) {
  const Digit* digits = static_cast<const Digit*>(call.digits);
  const auto most = static_cast<Digit>(call.most);
  const int64_t count = call.count, groups = (count + kGroup - 1) / kGroup;
  std::vector<Digit> found(static_cast<size_t>(count) + 1);  // the sums that are not 0
  std::vector<uint8_t> flags(static_cast<size_t>(count) + kByte), fours(static_cast<size_t>(groups) + 2);
  int64_t left = 0, occupied = 0;
  for (int64_t i = 0; i < count; i += kByte) {
    const Digit* group = digits + i;
    Digit padded[kByte];
    if (count - i < kByte) {
      std::fill(padded, padded + kByte, most);
      std::copy(group, digits + count, padded);
      group = padded;
    }
    uint32_t mask = 0;
    for (int k = 0; k < kByte; ++k) {
      const uint32_t picked = group[k] != most ? 1 : 0;
      mask |= picked << k;
      found[static_cast<size_t>(left)] = group[k];
      left += picked;
    }
    for (int half = 0; half < 2; ++half) {
      const uint32_t four = mask >> (half * kGroup) & 15u, picked = four != 0 ? 1 : 0;
      flags[static_cast<size_t>(i / kGroup + half)] = static_cast<uint8_t>(picked);
      fours[static_cast<size_t>(occupied)] = static_cast<uint8_t>(four);
      occupied += picked;
    }
  }
  int64_t bytes = bytes_of(groups) + bytes_of(occupied * kGroup) + bytes_of(left);
  if (bytes >= limit) return limit;
  to = write_flags(flags.data(), groups, to);
  fours[static_cast<size_t>(occupied)] = 0;
  for (int64_t i = 0; i < occupied; i += 2) {
    const uint8_t* two = fours.data() + i;
    *to++ = static_cast<uint8_t>(two[0] | two[1] << kGroup);
  }
  for (int64_t i = 0; i < left; ++i) {
    const Digit digit = found[static_cast<size_t>(i)];
    flags[static_cast<size_t>(i)] = digit > most ? 1 : 0;
    found[static_cast<size_t>(i)] = static_cast<Digit>(digit > most ? digit - most : most - digit);
  }
  to = write_flags(flags.data(), left, to);
  for (uint32_t size = 1; size < call.most && left > 0; ++size) {
    bytes += bytes_of(left);
    if (bytes >= limit) return limit;
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      const Digit own = found[static_cast<size_t>(i)];
      const uint8_t picked = own > size ? 1 : 0;
      flags[static_cast<size_t>(i)] = picked;
      found[static_cast<size_t>(kept)] = own;
      kept += picked;
    }
    to = write_flags(flags.data(), left, to);
    left = kept;
  }
  return bytes;
}

// Of each eight sums, which are not 0, one bit for each; read from the first two planes. Returns whether these are
// there, and how many sums are not 0 in all.
bool read_masks(PlaneReader& reader, int64_t count, std::vector<uint8_t>& masks, int64_t& left) {
  const int64_t groups = (count + kGroup - 1) / kGroup;
  if (!reader.open(groups)) return false;
  int64_t occupied = 0;
  std::vector<uint8_t> flags(static_cast<size_t>(groups));
  for (int64_t i = 0; i < groups; ++i) {
    flags[static_cast<size_t>(i)] = static_cast<uint8_t>(reader.bit(i));
    occupied += reader.bit(i);
  }
  if (!reader.open(occupied * kGroup)) return false;
  std::vector<uint8_t> fours(reader.plane(), reader.plane() + bytes_of(occupied * kGroup));
  fours.push_back(0);  // read, and not used, behind the last one
  masks.assign(static_cast<size_t>(bytes_of(count)), 0);
  int64_t next = 0;
  for (int64_t i = 0; i < groups; ++i) {
    const uint32_t picked = flags[static_cast<size_t>(i)];
    const uint32_t four = fours[static_cast<size_t>(next / 2)] >> (next % 2 * kGroup) & 15u;
    masks[static_cast<size_t>(i / 2)] |= static_cast<uint8_t>(four * picked << (i % 2 * kGroup));
    next += picked;
  }
  if (count % kByte != 0) masks.back() &= static_cast<uint8_t>((1u << (count % kByte)) - 1);
  left = 0;
  for (const uint8_t mask : masks) left += static_cast<int64_t>(std::bitset<kByte>(mask).count());
  return true;
}

template <class Digit>
bool read(const PlanesCall& call, const uint8_t* from, int64_t bytes) {
  Digit* digits = static_cast<Digit*>(call.digits);
  const auto most = static_cast<Digit>(call.most);
  PlaneReader reader(from, bytes);
  std::vector<uint8_t> masks;
  int64_t left = 0;
  if (!read_masks(reader, call.count, masks, left) || !reader.open(left)) return false;
  const int64_t count = left;
  std::vector<Digit> found(static_cast<size_t>(count) + 1, 1);  // the sums that are not 0, at first without their signs
  std::vector<uint8_t> positive(static_cast<size_t>(count));
  std::vector<int64_t> places(static_cast<size_t>(count));  // of those among them that may be larger still
  for (int64_t i = 0; i < left; ++i) {
    positive[static_cast<size_t>(i)] = static_cast<uint8_t>(reader.bit(i));
    places[static_cast<size_t>(i)] = i;
  }
  for (uint32_t size = 1; size < call.most && left > 0; ++size) {
    if (!reader.open(left)) return false;
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      const uint32_t picked = reader.bit(i);
      const int64_t place = places[static_cast<size_t>(i)];
      found[static_cast<size_t>(place)] += static_cast<Digit>(picked);
      places[static_cast<size_t>(kept)] = place;
      kept += picked;
    }
    left = kept;
  }
  if (!reader.ended()) return false;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = found[static_cast<size_t>(i)], twice = 2 * positive[static_cast<size_t>(i)];
    found[static_cast<size_t>(i)] = static_cast<Digit>(twice * size - size);
  }
  const Digit* next = found.data();
  for (int64_t i = 0; i < call.count; i += kByte) {
    const int64_t here = std::min(call.count - i, int64_t{kByte});
    const uint32_t mask = masks[static_cast<size_t>(i / kByte)];
    for (int64_t k = 0; k < here; ++k) {
      const uint32_t picked = mask >> k & 1u;
      digits[i + k] = static_cast<Digit>(most + (*next & (0u - picked)));
      next += picked;
    }
  }
  return true;
}

}  // namespace

int64_t write_planes(const PlanesCall& call, uint8_t* to, int64_t limit) {
  return digit_size(2 * call.most + 1) == 1 ? write<uint8_t>(call, to, limit) : write<uint32_t>(call, to, limit);
}

bool read_planes(const PlanesCall& call, const uint8_t* from, int64_t bytes) {
  return digit_size(2 * call.most + 1) == 1 ? read<uint8_t>(call, from, bytes) : read<uint32_t>(call, from, bytes);
}

}  // namespace csgd
