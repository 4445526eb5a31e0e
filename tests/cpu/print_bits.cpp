// SPDX-License-Identifier: Apache-2.0
// Prints a digest of what the CPU loops compute, for each case. Programs of several compilers must print the same.
//
//     print_bits ISA                    a line "NAME: DIGEST" for each case
//     print_bits ISA FOLDER NAME...     writes the arrays of these cases, each into a folder FOLDER/NUMBER
//
// ISA: baseline, avx2 or avx512. The exit status is 3 where this processor does not have it.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/step_cpu.h"
#include "cases.h"

namespace cases {

uint64_t Memory::digest() const {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
  const auto add = [&](const unsigned char* bytes, size_t count) {
    for (size_t k = 0; k < count; ++k) hash = (hash ^ bytes[k]) * 0x100000001B3u;
  };
  const auto is_nan = [](const unsigned char* at, size_t size) {
    double value = 0;
    if (size == sizeof(float)) {
      float single;
      std::memcpy(&single, at, size);
      value = single;
    } else {
      std::memcpy(&value, at, size);
    }
    return value != value;
  };
  for (const Array& array : arrays_) {
    const size_t size = array.float_size != 0 ? array.float_size : 1;
    for (size_t k = 0; k < array.after.size(); k += size) {
      const unsigned char* at = array.after.data() + k;
      const unsigned char nan[sizeof(double)] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
      add(array.float_size != 0 && is_nan(at, size) ? nan : at, size);
    }
  }
  return hash;
}

void Memory::write(const std::string& folder) const {
  const auto write_file = [&](const std::string& name, const std::vector<unsigned char>& bytes) {
    const std::string path = folder + "/" + name;
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (file == nullptr || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fclose(file) != 0) {
      std::fprintf(stderr, "print_bits: cannot write %s\n", path.c_str());
      std::exit(1);
    }
  };
  for (const Array& array : arrays_) {
    write_file(array.name + ".before", array.before);
    write_file(array.name + ".after", array.after);
  }
}

}  // namespace cases

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: print_bits ISA [FOLDER NAME...]\n"), 2;
  if (!csgd::set_cpu_isa(argv[1])) return std::fprintf(stderr, "print_bits: no %s here\n", argv[1]), 3;
  int written = 0;
  const cases::Take take = [&](const std::string& name, const std::function<void(cases::Memory&)>& run) {
    for (int k = 3; k < (argc > 2 ? argc : 4); ++k) {
      if (argc > 2 && name != argv[k]) continue;
      cases::Memory memory;
      run(memory);
      if (argc > 2) {
        memory.write(argv[2] + ("/" + std::to_string(k - 3)));
        ++written;
      } else {
        std::printf("%s: %016" PRIx64 "\n", name.c_str(), memory.digest());
      }
    }
  };
  cases::steps(take);
  cases::calibrated_gradients(take);
  cases::thresholds(take);
  cases::exchanges(take);
  if (argc > 2 && written != argc - 3) return std::fprintf(stderr, "print_bits: a NAME is that of no case\n"), 2;
  return 0;
}
