# SPDX-License-Identifier: Apache-2.0
"""The step of the calibrated optimizers in pure PyTorch: any device, any torch, the same bits as the kernels.

It is what runs without a compiler, and what the kernels are held against. docs/algorithm.md derives the rule;
csrc/core is the same rule in C++. Every operation is rounded on its own, hence no ``alpha=``, no ``addcmul``, no
``65536 / tensor`` (which torch computes as a reciprocal and a product), no ``tensor / 3`` (which it computes so on a
GPU), and no ``sum`` or ``mean`` of floats, whose order is that of the device. tests/rule/test_as_on_cuda.py refuses all
other operators that are not known to have the same bits on a GPU.
"""
