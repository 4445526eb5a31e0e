# SPDX-License-Identifier: Apache-2.0
"""Unpickles containers, numbers, texts and numpy arrays, and nothing else: a pickle can call whatever it names."""

from __future__ import annotations

import io
import pickle

import numpy as np

_RECONSTRUCT = np.empty(0).__reduce__()[0]  # what each pickled array names; numpy has no public name for it
# By (module, name): numpy has moved its own, and the CIFAR files were written by numpy 1 on Python 2.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class UnsafePickle(Exception):
    """The pickle names something that is not allowed, or is damaged."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise UnsafePickle(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def load_arrays(content: bytes) -> object:
    """What the pickle holds; byte strings of Python 2 stay bytes. Raises UnsafePickle."""
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except UnsafePickle:
        raise
    except Exception as error:  # damage raises almost anything
        raise UnsafePickle(f"damaged: {type(error).__name__}") from None
