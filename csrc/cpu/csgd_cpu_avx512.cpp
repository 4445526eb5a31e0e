// SPDX-License-Identifier: Apache-2.0
// The CPU loop compiled for AVX-512. The standard headers come first: their inline functions must stay
// in the default instruction set, since the linker may keep this file's copy for every caller. FMA stays off:
// the update rule rounds each multiplication and addition on its own.
#include <cstdint>
#include <cstring>

#include "isa.h"

#if CSGD_X86_DISPATCH
#if defined(__clang__)
CSGD_PUSH_TARGET("avx2,avx512f,avx512bw,avx512dq,avx512vl")
#else
CSGD_PUSH_TARGET("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define CSGD_ISA avx512
#include "csgd_tile.h"
CSGD_POP_TARGET
#endif
