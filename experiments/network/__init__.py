# SPDX-License-Identifier: Apache-2.0
"""Gradient exchanges of DistributedDataParallel on slow networks: bytes, times, accuracy, and a model of them."""
