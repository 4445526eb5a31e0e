# SPDX-License-Identifier: Apache-2.0
"""Trainings with CSGD beside torch.optim.SGD; python -m experiments."""
