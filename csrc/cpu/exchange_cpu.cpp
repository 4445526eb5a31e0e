// SPDX-License-Identifier: Apache-2.0
// Chooses the loops of the exchange for an instruction set.
#include "exchange_cpu.h"

#include <cstring>

#include "isa.h"
#include "step_cpu.h"

namespace csgd {

namespace baseline {
ExchangeLoops exchange_loops();
}
#if CSGD_X86_DISPATCH
namespace avx2 {
ExchangeLoops exchange_loops();
}
namespace avx512 {
ExchangeLoops exchange_loops();
}
#endif

ExchangeLoops exchange_loops() {
#if CSGD_X86_DISPATCH
  if (std::strcmp(cpu_isa(), "avx512") == 0) return avx512::exchange_loops();
  if (std::strcmp(cpu_isa(), "avx2") == 0) return avx2::exchange_loops();
#endif
  return baseline::exchange_loops();
}

}  // namespace csgd
