# SPDX-License-Identifier: Apache-2.0
"""Calibrated Stochastic Gradient Descent for PyTorch, fused in C++ and CUDA.

``CSGD`` and ``CalibratedAdamW`` are the optimizers, ``csgd_`` and ``calibrated_adamw_`` their steps as functions.
``GradientCalibration`` is our layer, ``calibrate_grad`` what it does as a function; ``calibrate(model)`` puts it into
a model, ``uncalibrate(model)`` takes it out. ``GCConv2d`` and ``GCLinear`` are the paper's layer, ``calibrate_filters``
reads it as an estimator of the filters, and ``fold(model)`` makes plain layers of these. ``hard_threshold_`` keeps the
k largest elements or filters of tensors, ``export_pruned`` makes a smaller model of what is left, and
``cuttable_weights`` lists the weights that are worth pruning for it.
``show_config()`` says what was built.
"""

from . import moved
from .extension import show_config
from .layers.branches import calibrate_filters
from .layers.convert import calibrate, number_layers, uncalibrate
from .layers.filters import GCConv2d, GCLinear
from .layers.fold import fold
from .layers.functional import calibrate_grad
from .layers.module import GradientCalibration
from .optim.adamw import CalibratedAdamW
from .optim.csgd import CSGD
from .optim.functional import calibrated_adamw_, csgd_
from .pruning.export import cuttable_weights, export_pruned
from .pruning.hard_threshold import hard_threshold_
from .pruning.options import PruningOptions
from .pruning.semi_structured import to_semi_structured

__all__ = [
    "CSGD",
    "CalibratedAdamW",
    "GCConv2d",
    "GCLinear",
    "GradientCalibration",
    "PruningOptions",
    "calibrate",
    "calibrate_filters",
    "calibrate_grad",
    "calibrated_adamw_",
    "csgd_",
    "cuttable_weights",
    "export_pruned",
    "fold",
    "hard_threshold_",
    "number_layers",
    "show_config",
    "to_semi_structured",
    "uncalibrate",
]
__version__ = "0.1.0"

moved.register()
