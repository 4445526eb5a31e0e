// SPDX-License-Identifier: Apache-2.0
// Cases of step_against_cpu_loop.cpp that its arguments describe: any combination of dtype, parts of the rule, rounding
// and alignment, as "bfloat16, momentum, misaligned" or "float32, AdamW, shard".
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "step_cases.h"

namespace csgd {

struct Word {
  const char* text;
  void (*apply)(Case& c);
};

constexpr Word kWords[] = {
    {"float32", [](Case& c) { c.dtype = DType::kFloat32; }},
    {"float64", [](Case& c) { c.dtype = DType::kFloat64; }},
    {"bfloat16", [](Case& c) { c.dtype = DType::kBFloat16; }},
    {"float16", [](Case& c) { c.dtype = DType::kFloat16; }},
    {"AdamW", [](Case& c) { c.adamw = true; }},
    {"momentum", [](Case& c) { c.options.momentum = 0.9; }},
    {"nesterov", [](Case& c) { c.options.nesterov = true; }},
    {"weight decay", [](Case& c) { c.options.weight_decay = 0.01; }},
    {"no calibration", [](Case& c) { c.options.calibration = 0; }},
    {"nearest", [](Case& c) { c.options.stochastic_rounding = false; }},
    {"misaligned", [](Case& c) { c.offsets = {1, 1, {1, 1}}; }},
    {"misaligned gradient", [](Case& c) { c.offsets.grad = 1; }},
    {"shard", [](Case& c) { c.layout = {1003, 5000, 5000, 1, 5000}; }},
};

// A step of float32 without any part, changed by each of the words, which commas separate. Exits at an unknown word.
inline Case described_case(const char* words) {
  Case c{};
  c.name = words;
  c.options = base_options();
  c.options.momentum = 0;
  c.sizes = {0, 1, 7, 8, 9, 257, 2049, 5000};
  c.launches = 1;
  for (const char* at = words; *at != 0;) {
    const size_t length = std::strcspn(at, ",");
    const Word* found = std::find_if(std::begin(kWords), std::end(kWords), [&](const Word& word) {
      return std::strlen(word.text) == length && std::memcmp(word.text, at, length) == 0;
    });
    if (found == std::end(kWords)) std::printf("unknown: %s\n", at), std::exit(2);
    found->apply(c);
    at += length;
    at += std::strspn(at, ", ");
  }
  return c;
}

}  // namespace csgd
