# SPDX-License-Identifier: Apache-2.0
"""The step of the calibrated optimizers in pure PyTorch: any device, any torch, the same bits as the kernels.

It is what runs without a compiler, and what the kernels are held against. docs/algorithm.md derives the rule;
csrc/core is the same rule in C++. Every operation is rounded on its own, hence no ``alpha=``, no ``addcmul``, no
``65536 / tensor`` (which torch computes as a reciprocal and a product).
"""
