# SPDX-License-Identifier: Apache-2.0
"""Tensors of any layout between guards, which show writes past their ends or into their gaps."""

import torch

# Elements on either side: more than any loop takes at once, and a multiple of every alignment.
GUARD = 64
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_PATTERN = {8: 0x5A5A5A5A5A5A5A5A, 4: 0x5A5A5A5A, 2: 0x5A5A}  # huge, but finite: if it is read, the bound shows it

LAYOUTS = ["contiguous", "reversed dimensions", "channels last", "misaligned", "padded rows", "every third"]


def strides_of(shape, layout):
    """The strides of a tensor of this shape; the last two layouts leave gaps."""
    dims = list(range(len(shape)))[::-1]  # from the innermost
    if layout == "reversed dimensions":
        dims.reverse()
    elif layout == "channels last" and len(shape) > 2:
        dims.insert(0, dims.pop(-2))
    strides, reach = [0] * len(shape), 3 if layout == "every third" else 1
    for place, dim in enumerate(dims):
        strides[dim] = reach
        reach = reach * max(1, shape[dim]) + (2 if layout == "padded rows" and place == 0 else 0)
    return strides


class Guarded:
    """``view``: the values as a part of a larger buffer, all other elements of which are guards."""

    def __init__(self, values, strides=None, offset=0):
        strides = values.stride() if strides is None else strides
        reach = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
        size, place = 2 * GUARD + offset + (reach if values.numel() else 0), GUARD + offset
        bytes_each = values.element_size()
        self._words = torch.full((size,), _PATTERN[bytes_each], dtype=_INTEGER[bytes_each])
        outside = torch.ones(size, dtype=torch.bool)
        outside.as_strided(values.shape, strides, place).fill_(False)
        self._outside = outside.nonzero().view(-1)
        self._expected = self._words[self._outside]
        self.view = self._words.view(values.dtype).as_strided(values.shape, strides, place).copy_(values).detach()

    def intact(self):
        return torch.equal(self._words[self._outside], self._expected)
