// SPDX-License-Identifier: Apache-2.0
// csrc/core compiles without torch and CUDA: this program reproduces Philox's known answers with it alone.
#include <cstdio>

#include "../../csrc/core/update_rule.h"

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: core_alone KNOWN_ANSWERS\n"), 2;
  std::FILE* file = std::fopen(argv[1], "r");
  if (file == nullptr) return std::fprintf(stderr, "cannot open %s\n", argv[1]), 2;
  char line[256];
  int answers = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    uint32_t w[10];
    if (std::sscanf(line, "%x %x %x %x %x %x %x %x %x %x", &w[0], &w[1], &w[2], &w[3], &w[4], &w[5], &w[6], &w[7],
                    &w[8], &w[9]) != 10) {
      continue;
    }
    const uint64_t key = w[4] | uint64_t{w[5]} << 32;
    const csgd::Philox4x32 counter = {{w[0], w[1], w[2], w[3]}};
    const csgd::Philox4x32 got = csgd::philox4x32_10(counter, key);
    const csgd::Philox4x32 by_round_keys = csgd::philox4x32_10(counter, csgd::philox_round_keys(key));
    for (int k = 0; k < 4; ++k) {
      if (got.word[k] != w[6 + k] || by_round_keys.word[k] != w[6 + k])
        return std::fprintf(stderr, "wrong word %d for: %s", k, line), 1;
    }
    ++answers;
  }
  std::fclose(file);
  std::printf("%d known answers\n", answers);
  return answers > 0 ? 0 : 1;
}
