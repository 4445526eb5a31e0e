// SPDX-License-Identifier: Apache-2.0
// The kernels that write rows of sums as planes of bits and read them, their own source emulated on the CPU, against
// the CPU loops: the same bytes, the same words, the same rows refused. Usage: planes_against_cpu_loop [CASE]; exit
// status 0 if everything agrees.
#include <algorithm>
#include <cstdio>

#include "compare.h"
#include "csrc/cpu/exchange_cpu.h"
#include "csrc/cpu/planes_cpu.h"
#include "csrc/cuda/planes_cuda.h"

using namespace csgd;

namespace {

struct Case {
  const char* name;
  int64_t words = 150;
  uint32_t most = 4;
  double share = 0.2;  // of the sums that are not 0
  int64_t rows = 2;
};

constexpr uint8_t kUntouched = 9;  // behind what a kernel writes

bool differ(const Case& c, const char* what) {
  return std::printf("%s, %lld words, up to %u: %s differs\n", c.name, static_cast<long long>(c.words), c.most, what),
         false;
}

PlaneRows rows_of(const Case& c) {
  const uint32_t radix = 2 * c.most + 1;
  int places = 0;
  for (double power = radix; power <= 0x1p32; power *= radix) ++places;
  return {c.rows, c.words, radix, c.most, places};
}

int64_t sums_of_row(const PlaneRows& of) { return of.words * of.places; }

// Sums plus `most`: most of them small.
std::vector<uint32_t> random_sums(const PlaneRows& of, double share, uint64_t seed) {
  Random random(seed);
  std::vector<uint32_t> sums(static_cast<size_t>(of.rows * sums_of_row(of)), of.most);
  for (uint32_t& sum : sums) {
    if (static_cast<double>(random() >> 11) * 0x1p-53 >= share) continue;
    uint32_t size = 1;
    while (size < of.most && random() % 3 == 0) ++size;
    sum = random() % 2 == 0 ? sum + size : sum - size;
  }
  // In each row the last group, which the end of the row may cut off, has bits; and a bit too many takes another byte,
  // since the sums that are not 0 are a multiple of eight, as far as the row is long enough.
  const auto count = static_cast<size_t>(sums_of_row(of));
  for (size_t begin = 0; share > 0 && begin < sums.size(); begin += count) {
    sums[begin + count - 1] = of.most + 1;
    const auto zeros = std::count(sums.begin() + begin, sums.begin() + begin + count, of.most);
    auto missing = 7 - (count - zeros + 7) % 8;
    for (size_t i = begin; i < begin + count && missing > 0; ++i) {
      if (sums[i] != of.most) continue;
      sums[i] = of.most - 1;
      --missing;
    }
  }
  return sums;
}

std::vector<uint32_t> packed(const PlaneRows& of, const std::vector<uint32_t>& sums) {
  std::vector<uint32_t> words(static_cast<size_t>(of.rows * of.words));
  for (int64_t w = 0; w < of.rows * of.words; ++w) {
    const auto* row = sums.data() + w / of.words * sums_of_row(of);
    for (int place = of.places - 1; place >= 0; --place) {
      words[static_cast<size_t>(w)] = words[static_cast<size_t>(w)] * of.radix + row[place * of.words + w % of.words];
    }
  }
  return words;
}

// The sums of a row as the CPU loops take them.
struct Digits {
  Digits(const PlaneRows& of, const uint32_t* sums) : wide(sums, sums + sums_of_row(of)), narrow(wide.size()) {
    for (size_t i = 0; i < wide.size(); ++i) narrow[i] = static_cast<uint8_t>(wide[i]);
    const bool bytes = digit_size(of.radix) == 1;
    call = {bytes ? static_cast<void*>(narrow.data()) : wide.data(), sums_of_row(of), of.most};
  }

  uint32_t at(size_t i) const { return call.digits == wide.data() ? wide[i] : narrow[i]; }

  std::vector<uint32_t> wide;
  std::vector<uint8_t> narrow;
  PlanesCall call;
};

// What the CPU loops write, one row after another.
std::vector<std::vector<uint8_t>> expected_rows(const PlaneRows& of, const std::vector<uint32_t>& sums,
                                                const std::vector<uint32_t>& words) {
  const int64_t limit = of.words * 4;
  std::vector<std::vector<uint8_t>> rows;
  for (int64_t row = 0; row < of.rows; ++row) {
    std::vector<uint8_t> bytes(static_cast<size_t>(limit));
    const int64_t length = write_planes(Digits(of, sums.data() + row * sums_of_row(of)).call, bytes.data(), limit);
    if (length == limit) std::memcpy(bytes.data(), words.data() + row * of.words, static_cast<size_t>(limit));
    bytes.resize(static_cast<size_t>(length));
    rows.push_back(bytes);
  }
  return rows;
}

bool write(const Case& c, const PlaneRows& of, const std::vector<uint32_t>& words,
           const std::vector<std::vector<uint8_t>>& rows) {
  const auto limit = static_cast<size_t>(of.words * 4);
  std::vector<uint32_t> to(words.size() + 1, 0);  // of words for the alignment
  to.back() = kUntouched;
  std::vector<int64_t> lengths(rows.size() + 1, kUntouched), counts(static_cast<size_t>(plane_counts(of)), -1);
  auto* bytes = reinterpret_cast<uint8_t*>(to.data());
  if (launch_write_planes_cuda({of, words.data(), bytes, lengths.data(), counts.data()}, nullptr) != cudaSuccess) {
    return differ(c, "a launch");
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    if (lengths[row] != static_cast<int64_t>(rows[row].size())) return differ(c, "a length");
    const std::vector<uint8_t> own(bytes + row * limit, bytes + row * limit + rows[row].size());
    if (!same_bits(own, rows[row])) return differ(c, "a byte");
  }
  return (to.back() == kUntouched && lengths.back() == kUntouched) || differ(c, "a number behind the rows");
}

// Whether the kernels read what the CPU loops read, and refuse what these refuse.
bool read(const Case& c, const PlaneRows& of, const std::vector<std::vector<uint8_t>>& rows) {
  std::vector<uint8_t> message(1);  // rows begin anywhere
  std::vector<int64_t> begins = {1};
  for (const auto& row : rows) {
    message.insert(message.end(), row.begin(), row.end());
    begins.push_back(static_cast<int64_t>(message.size()));
  }
  std::vector<uint32_t> words(static_cast<size_t>(of.rows * of.words) + 1, kUntouched);
  std::vector<uint8_t> broken(rows.size() + 1, kUntouched);
  std::vector<int64_t> tables(static_cast<size_t>(plane_tables(of)), -1);
  std::vector<int64_t> ranks(static_cast<size_t>(plane_ranks(of)), -1);
  if (launch_read_planes_cuda({of, message.data(), begins.data(), words.data(), reinterpret_cast<bool*>(broken.data()),
                               tables.data(), ranks.data()},
                              nullptr) != cudaSuccess) {
    return differ(c, "a launch");
  }
  if (words.back() != kUntouched || broken.back() != kUntouched) return differ(c, "a number behind the words");
  for (size_t row = 0; row < rows.size(); ++row) {
    const auto* own = words.data() + static_cast<int64_t>(row) * of.words;
    std::vector<uint32_t> expected(static_cast<size_t>(of.words), kUntouched);
    bool good = true;
    if (rows[row].size() == expected.size() * 4) {
      std::memcpy(expected.data(), rows[row].data(), rows[row].size());
    } else {
      Digits digits(of, std::vector<uint32_t>(static_cast<size_t>(sums_of_row(of))).data());
      good = read_planes(digits.call, rows[row].data(), static_cast<int64_t>(rows[row].size()));
      PlaneRows one = of;
      one.rows = 1;
      std::vector<uint32_t> sums;
      for (size_t i = 0; i < digits.wide.size(); ++i) sums.push_back(digits.at(i));
      if (good) expected = packed(one, sums);
    }
    if ((broken[row] == 0) != good) return differ(c, "what is refused");
    if (std::memcmp(own, expected.data(), expected.size() * 4) != 0) return differ(c, "a word");
  }
  return true;
}

bool run(const Case& c) {
  const PlaneRows of = rows_of(c);
  const std::vector<uint32_t> sums = random_sums(of, c.share, static_cast<uint64_t>(c.words) + c.most);
  const std::vector<uint32_t> words = packed(of, sums);
  std::vector<std::vector<uint8_t>> rows = expected_rows(of, sums, words);
  if (!write(c, of, words, rows) || !read(c, of, rows)) return false;
  // One row is cut off, or has a byte too many, or bits that stand for nothing, or any others.
  std::vector<uint8_t>& last = rows.back();
  const std::vector<uint8_t> right = last;
  Random random(5);
  int64_t occupied = 0;  // groups with a sum that is not 0
  const int64_t begin = sums_of_row(of) * (of.rows - 1), groups = (sums_of_row(of) + 3) / 4;
  for (int64_t i = 0; i < sums_of_row(of); i += 4) {
    bool any = false;
    for (int64_t k = i; k < std::min(i + 4, sums_of_row(of)); ++k) any = any || sums[begin + k] != of.most;
    occupied += any ? 1 : 0;
  }
  for (const int change : {0, 1, 2, 3, 4}) {
    last = right;
    if (change == 0) last.pop_back();
    if (change == 1 && static_cast<int64_t>(last.size()) + 1 < of.words * 4) last.push_back(0xFF);
    if (change == 2) last.back() |= 0x80;
    if (change == 3) last[random() % last.size()] ^= static_cast<uint8_t>(1u << random() % 8);
    if (change == 4 && occupied > 0 && static_cast<int64_t>(last.size()) < of.words * 4) {  // where the row has ended
      const int64_t bit = (groups + 7) / 8 * 8 + 4 * occupied - 1;
      last[bit / 8] |= static_cast<uint8_t>(1u << bit % 8);
    }
    if (!read(c, of, rows)) return false;
  }
  std::printf("%s, %lld words, up to %u: %lld rows agree\n", c.name, static_cast<long long>(c.words), c.most,
              static_cast<long long>(c.rows));
  return true;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t words : {1, 2, 3, 13, 64, 65, 409, 410, 1000}) all.push_back({.name = "sizes", .words = words});
  for (const uint32_t most : {1, 2, 3, 8, 127, 128}) all.push_back({.name = "ranks", .words = 100, .most = most});
  for (const double share : {0.0, 0.01, 0.6, 1.0}) all.push_back({.name = "shares", .share = share});
  all.push_back({.name = "many rows", .words = 20, .rows = 70});
  // More blocks than a block has threads, and planes of more bits than it indexes at a time.
  all.push_back({.name = "long row", .words = 7000, .rows = 1});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  bool good = true;
  for (const Case& c : cases()) {
    if (is_chosen(c.name, argc, argv)) good = good && run(c);
  }
  return good ? 0 : 1;
}
