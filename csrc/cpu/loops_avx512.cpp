// SPDX-License-Identifier: Apache-2.0
// The CPU loops compiled for AVX-512. The standard headers come first: their inline functions must be compiled for the
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

// GCC warns of operands inside its own AVX-512 intrinsics that are undefined on purpose (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "isa.h"

#if CSGD_X86_DISPATCH
#if defined(__clang__)
CSGD_PUSH_TARGET("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#else
CSGD_PUSH_TARGET("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define CSGD_ISA avx512
#define CSGD_VECTOR_BYTES 64
#include "words_avx512.h"
// The header above defines Words, which these need.
#include "calibrate_grad_tile.h"
#include "exchange_tile.h"
#include "step_tile.h"
CSGD_POP_TARGET
#endif
