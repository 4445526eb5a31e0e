// SPDX-License-Identifier: Apache-2.0
// The CPU loops in the instruction set that the compiler targets by default; compiles on any processor.
#define CSGD_ISA baseline
#define CSGD_VECTOR_BYTES 16
#include "words_scalar.h"
// Words come first.
#include "calibrate_grad_tile.h"
#include "csgd_tile.h"
#include "exchange_tile.h"
