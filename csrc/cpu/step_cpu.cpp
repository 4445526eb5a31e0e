// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set of the CPU loops, and completes the step of a tensor.
#include "step_cpu.h"

#include <cstring>

#include "../core/update_rule.h"
#include "calibrate_grad_cpu.h"
#include "isa.h"

#if CSGD_X86_DISPATCH
#include <cpuid.h>
#endif

namespace csgd {

#define CSGD_LOOPS_OF(isa)                                    \
  namespace isa {                                             \
  ChunkFunction<SgdOptions> sgd_function(DType dtype);        \
  ChunkFunction<AdamWOptions> adamw_function(DType dtype);    \
  CalibrateGradFunction calibrate_grad_function(DType dtype); \
  }
CSGD_LOOPS_OF(baseline)
#if CSGD_X86_DISPATCH
CSGD_LOOPS_OF(avx2)
CSGD_LOOPS_OF(avx512)
#endif

namespace {

#if CSGD_X86_DISPATCH
// Clang 14 does not know this name in __builtin_cpu_supports(). That the system saves the registers is part of the
// answer for AVX2.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

struct Isa {
  const char* name;
  ChunkFunction<SgdOptions> (*sgd_function)(DType);
  ChunkFunction<AdamWOptions> (*adamw_function)(DType);
  CalibrateGradFunction (*calibrate_grad_function)(DType);
  bool (*supported)();
};

const Isa kIsas[] = {
#if CSGD_X86_DISPATCH
    {"avx512", avx512::sgd_function, avx512::adamw_function, avx512::calibrate_grad_function,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", avx2::sgd_function, avx2::adamw_function, avx2::calibrate_grad_function,
     [] { return __builtin_cpu_supports("avx2") && has_f16c(); }},
#endif
    {"baseline", baseline::sgd_function, baseline::adamw_function, baseline::calibrate_grad_function,
     [] { return true; }},
};

const Isa* widest_isa() {
  const Isa* isa = kIsas;
  while (!isa->supported()) ++isa;
  return isa;
}

const Isa*& current_isa() {
  static const Isa* isa = widest_isa();
  return isa;
}

}  // namespace

template <>
ChunkFunction<SgdOptions> chunk_function(DType dtype) {
  return current_isa()->sgd_function(dtype);
}

template <>
ChunkFunction<AdamWOptions> chunk_function(DType dtype) {
  return current_isa()->adamw_function(dtype);
}

CalibrateGradFunction calibrate_grad_function(DType dtype) { return current_isa()->calibrate_grad_function(dtype); }

const char* cpu_isa() { return current_isa()->name; }

bool set_cpu_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.supported()) {
      current_isa() = &isa;
      return true;
    }
  }
  return false;
}

void finish_tensor(DType dtype, const StepOptions& options, const StepTensor& tensor, ChunkResult total) {
  with_storage(dtype, [&](auto tag) {
    using T = typename Storage<decltype(tag)>::Opmath;
    const auto largest_bits = static_cast<typename FloatBits<T>::Type>(total.largest_bits);
    advance(options, tensor, bit_cast<T>(largest_bits), total.moved);
  });
}

}  // namespace csgd
