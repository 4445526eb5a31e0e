# SPDX-License-Identifier: Apache-2.0
"""Calibrated Stochastic Gradient Descent for PyTorch, fused in C++ and CUDA.

``CSGD`` is the optimizer, ``csgd_`` the same step as a function, ``show_config()`` says what was built.
"""

from .config import show_config
from .functional import csgd_
from .optimizer import CSGD

__all__ = ["CSGD", "csgd_", "show_config"]
__version__ = "0.1.0"
