# SPDX-License-Identifier: Apache-2.0
"""Lists of parameter shapes, written down from the architectures: nothing is downloaded or imported for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorList:
    """One list to be stepped: ``shapes(device_type)`` are the shapes of its tensors, in the model's order."""

    name: str
    label: str
    shapes: Callable[[str], list[Shape]]
    default_on: tuple[str, ...]  # device types
    one_each: bool = False  # an optimizer for each tensor, as where gradients are released in the backward pass


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al., 2016) with 1000 classes: 161 tensors, 25,557,032 parameters."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for weight in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [weight, weight[:1], weight[:1]]  # convolution; scale and shift of its batch normalisation
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def small_gpt() -> list[Shape]:
    """A decoder for characters: 6 layers, d 384, vocabulary 65, 256 places; 76 tensors, 10,770,816."""
    d, characters, places = 384, 65, 256
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(characters, d), (places, d), *(6 * block), (d,), (d,)]


def vit_b16() -> list[Shape]:
    """ViT-B/16 (Dosovitskiy et al., 2021), 224 x 224 pixels, 1000 classes: 152 tensors, 86,567,656 parameters."""
    d, hidden, tokens = 768, 3072, 197
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (hidden, d), (hidden,), (d, hidden), (d,)]
    ends = [(d,), (d,), (1000, d), (1000,)]
    return [(1, 1, d), (d, 3, 16, 16), (d,), (1, tokens, d), *(12 * block), *ends]


def decoder_1b() -> list[Shape]:
    """A Llama-like decoder: 16 layers, d 2048, 8 of 32 key heads, vocabulary 32000; 147 tensors, 1,104,218,112."""
    d, key, hidden, vocabulary = 2048, 512, 8192, 32000
    attention = [(d, d), (key, d), (key, d), (d, d)]
    block = [*attention, (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(vocabulary, d), *(16 * block), (d,), (vocabulary, d)]


def _flat(device_type: str) -> list[Shape]:
    return [(2**28 if device_type == "cuda" else 2**25,)]


_BOTH, _GPU, _CPU = ("cpu", "cuda"), ("cuda",), ("cpu",)
LISTS = {
    entry.name: entry
    for entry in (
        TensorList("flat", "one flat tensor", _flat, _BOTH),
        TensorList("resnet50", "ResNet-50", lambda _: resnet50(), _BOTH),
        TensorList("small_gpt", "decoder, 11 M parameters", lambda _: small_gpt(), _CPU),
        TensorList("vit_b16", "ViT-B/16", lambda _: vit_b16(), _GPU),
        TensorList("decoder_1b", "decoder, 1.1 B parameters", lambda _: decoder_1b(), _GPU),
        TensorList("thousand", "1000 tensors of 1000 elements", lambda _: 1000 * [(1000,)], _GPU),
        TensorList("tiny161", "161 tensors of 64 elements", lambda _: 161 * [(64,)], _BOTH),
        TensorList("tiny10", "10 tensors of 64 elements", lambda _: 10 * [(64,)], _CPU),
        TensorList("tiny1", "a tensor of 64 elements", lambda _: [(64,)], _CPU),
        TensorList("each161", "161 optimizers of 64 elements", lambda _: 161 * [(64,)], _CPU, one_each=True),
    )
}


def numel(shapes: list[Shape]) -> int:
    """Elements of all tensors together."""
    return sum(map(math.prod, shapes))


def scaled(shapes: list[Shape], factor: float) -> list[Shape]:
    """The same number of tensors, each with about ``factor`` times the elements, cut along the first dimension
    that is longer than 1."""
    if factor == 1:
        return list(shapes)

    def cut(shape: Shape) -> Shape:
        axis = next((i for i, n in enumerate(shape) if n > 1), 0)
        return tuple(max(1, round(n * factor)) if i == axis else n for i, n in enumerate(shape))

    return [cut(shape) for shape in shapes]
