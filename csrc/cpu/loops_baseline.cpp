// SPDX-License-Identifier: Apache-2.0
// The CPU loops in the default instruction set of the compiler, which every processor of the platform has.
#define CSGD_ISA baseline
#define CSGD_VECTOR_BYTES 16
#include "words_scalar.h"
// The header above defines Words, which these need.
#include "calibrate_grad_tile.h"
#include "exchange_tile.h"
#include "step_tile.h"
