// SPDX-License-Identifier: Apache-2.0
// Compiles part of a file for a newer x86 instruction set, which is chosen at run time. Elsewhere (aarch64, MSVC) the
// baseline loop is the only one.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CSGD_X86_DISPATCH 1
#else
#define CSGD_X86_DISPATCH 0
#endif

#define CSGD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CSGD_PUSH_TARGET(isa) CSGD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define CSGD_POP_TARGET CSGD_PRAGMA(clang attribute pop)
#else
#define CSGD_PUSH_TARGET(isa) CSGD_PRAGMA(GCC push_options) CSGD_PRAGMA(GCC target(isa))
#define CSGD_POP_TARGET CSGD_PRAGMA(GCC pop_options)
#endif
