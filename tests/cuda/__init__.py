# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels: on a GPU, emulated on a CPU, and as machine code."""
