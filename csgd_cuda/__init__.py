# SPDX-License-Identifier: Apache-2.0
"""Calibrated Stochastic Gradient Descent for PyTorch, fused in C++ and CUDA.

``CSGD`` is the optimizer, ``csgd_`` the same step as a function. ``GradientCalibration`` is the layer,
``calibrate_grad`` what it does as a function; ``calibrate(model)`` puts it into a model, ``uncalibrate(model)`` takes
it out. ``hard_threshold_`` keeps the k largest elements or filters of tensors,
``export_pruned`` makes a smaller model of what is left.
``show_config()`` says what was built.
"""

from .calibrated_model import calibrate, number_layers, uncalibrate
from .calibration import GradientCalibration
from .config import show_config
from .functional import csgd_
from .gradient import calibrate_grad
from .optimizer import CSGD
from .pruning import export_pruned, to_semi_structured
from .pruning_options import PruningOptions
from .thresholding import hard_threshold_

__all__ = [
    "CSGD",
    "GradientCalibration",
    "PruningOptions",
    "calibrate",
    "calibrate_grad",
    "csgd_",
    "export_pruned",
    "hard_threshold_",
    "number_layers",
    "show_config",
    "to_semi_structured",
    "uncalibrate",
]
__version__ = "0.1.0"
