# SPDX-License-Identifier: Apache-2.0
"""Modules under the names that they had before: pickled models and optimizers name them."""

import importlib
import sys

NEW_NAMES = {
    "calibrated_model": "layers.convert",
    "calibration": "layers.module",
    "functional": "optim.functional",
    "gradient": "layers.functional",
    "optimizer": "optim.csgd",
    "pruning_options": "pruning.options",
    "thresholding": "pruning.hard_threshold",
}


def register() -> None:
    """Lets ``import csgd_cuda.OLD``, and so pickle, find the module of the new name."""
    package = sys.modules[__package__]
    for old, new in NEW_NAMES.items():
        module = importlib.import_module(f"{__package__}.{new}")
        sys.modules[f"{__package__}.{old}"] = module
        setattr(package, old, module)
