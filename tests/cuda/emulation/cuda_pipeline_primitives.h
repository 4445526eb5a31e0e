// SPDX-License-Identifier: Apache-2.0
// Copies that a thread begins and waits for later. Every other copy is made at once, the rest at the last moment: code
// that reads before the wait, or fills memory again that has not been read, finds wrong values.
#pragma once

#include "cuda_runtime_api.h"

void __pipeline_memcpy_async(void* to, const void* from, size_t size);
void __pipeline_commit();
void __pipeline_wait_prior(size_t prior);  // waits for all groups of copies but the last `prior`
