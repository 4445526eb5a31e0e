# SPDX-License-Identifier: Apache-2.0
"""The degradations: JPEG compression, Gaussian noise, Gaussian blur; images are uint8 [C, H, W] numpy arrays."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

QUALITIES = (1, 95)  # Pillow: 0 is the worst, "values above 95 should be avoided"
MAX_NOISE = 255.0  # grey levels of 255
MAX_BLUR = 10.0  # pixels
_REACH = 4.0  # standard deviations after which the kernel of the blur is cut off: 6e-5 of its mass


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """``image`` (1 or 3 channels) after Pillow's JPEG codec at ``quality``, with its default subsampling of colour.

    ValueError for a quality out of QUALITIES, or another number of channels.
    """
    low, high = QUALITIES
    if quality != int(quality) or not low <= quality <= high:
        raise ValueError(f"quality must be a whole number from {low} to {high}, not {quality}")
    if image.shape[0] not in (1, 3):
        raise ValueError(f"JPEG is for images of 1 or 3 channels, not {image.shape[0]}")
    file = io.BytesIO()
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=int(quality))
    with Image.open(file) as compressed:
        decoded = np.asarray(compressed)
    return decoded[None] if decoded.ndim == 2 else np.ascontiguousarray(decoded.transpose(2, 0, 1))


def noise(image: np.ndarray, sigma: float, draws: np.random.Generator) -> np.ndarray:
    """``image`` plus normal noise of standard deviation ``sigma`` grey levels, rounded and clipped to 0 to 255.

    The noise is independent for each pixel and channel. What ``draws`` is left at does not depend on sigma.
    """
    check_sigma("noise", sigma, MAX_NOISE)
    added = draws.standard_normal(image.shape, dtype=np.float32)
    return _to_uint8(image + np.float32(sigma) * added)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """``image`` convolved with a Gaussian of standard deviation ``sigma`` pixels, edges repeated, rounded.

    The kernel itself, sampled at whole pixels and cut off after four sigmas: Pillow's GaussianBlur is a
    sequence of box filters that only resembles it, which shows at sigmas of about one pixel.
    """
    check_sigma("blur", sigma, MAX_BLUR)
    if sigma == 0:
        return image
    kernel = gaussian(sigma)
    result = image.astype(np.float32)
    for axis in (1, 2):
        result = _convolve(result, kernel, axis)
    return _to_uint8(result)


def gaussian(sigma: float) -> np.ndarray:
    """The one-dimensional kernel of blur(): float32 [2 * ceil(4 sigma) + 1], its sum is 1."""
    radius = math.ceil(_REACH * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (kernel / kernel.sum()).astype(np.float32)


def check_sigma(name: str, sigma: float, high: float) -> None:
    """ValueError unless 0 <= sigma <= high."""
    if not 0 <= sigma <= high:  # also for NaN
        raise ValueError(f"sigma of the {name} must be a number from 0 to {high:g}, not {sigma}")


def _convolve(image: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    radius = len(kernel) // 2
    margins = [(0, 0)] * image.ndim
    margins[axis] = (radius, radius)
    padded = np.pad(image, margins, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis) @ kernel


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.rint(image).clip(0, 255).astype(np.uint8)
