// SPDX-License-Identifier: Apache-2.0
// The CPU loops compiled for AVX2. The standard headers come first: their inline functions must be compiled for the
// default instruction set, since the linker may use the copies of this file for every caller. FMA stays off, since the
// update rule rounds each multiplication and addition on its own.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

#if CSGD_X86_DISPATCH
CSGD_PUSH_TARGET("avx2,f16c")
#define CSGD_ISA avx2
#define CSGD_VECTOR_BYTES 32
#include "words_avx2.h"
// The header above defines Words, which these need.
#include "calibrate_grad_tile.h"
#include "exchange_tile.h"
#include "step_tile.h"
CSGD_POP_TARGET
#endif
