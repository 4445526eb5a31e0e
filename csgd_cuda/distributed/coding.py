# SPDX-License-Identifier: Apache-2.0
"""What a rank computes in an exchange of codes: the kernels' operators where there are any, else pure PyTorch.

Both give the same bits. Codes are those of codes.py, words those of packing.py: a row of codes for each of W shards, of
which a shard is a multiple of 20 codes; sums of W codes, plus W, have the radix 2 W + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import extension
from ..functional import choose_backend
from ..options import signed_seed
from .codes import CODES, ZERO_CODE, encode
from .packing import digits_per_word, pack, unpack, words_for


class Coding(Protocol):
    """The four operations, of the kernels or of the reference."""

    def encode(
        self,
        grads: list[Tensor],
        bounds: Tensor,
        indices: Sequence[int],
        *,
        seed: int,
        step: int,
        antithetic: bool = False,
    ) -> Tensor:
        """The codes of several gradients, one after another, plus 1.

        Args:
            grads: contiguous, of one dtype (float32, bfloat16 or float16) and device; ``|g| <= bound`` for each.
            bounds: T of each gradient, float64 of shape (len(grads),), with at most 24 significant bits. Where it is
                not finite the codes mean nothing.
            indices: 0 ... 2^32 - 1 for each, telling the draws of this gradient and pair of ranks from those of others.
            seed: 0 ... 2^64 - 1.
            step: >= 0.
            antithetic: to take 1 - U for the random number U, as one rank of each pair does.

        Returns:
            uint8 of shape (n,), for the n elements of all gradients.
        """

    def pack(self, codes: Tensor, rows: int) -> Tensor:
        """Codes, uint8 of shape (n,), as words: int32 of shape (rows, words), ``code_words(n, rows)`` of them."""

    def add(self, words: Tensor) -> Tensor:
        """The sums of W rows of packed codes, packed themselves: int32 of shape (W, words) to (sum words,)."""

    def decode(self, words: Tensor, units: Tensor, grads: list[Tensor]) -> None:
        """Sets each gradient to its unit times the sums of its codes, rounded to its dtype.

        Args:
            words: the packed sums of all W shards, int32 of shape (W, sum words).
            units: T / W of each gradient, float64 of shape (len(grads),).
            grads: as those encoded; overwritten.
        """


def code_words(count: int, rows: int) -> int:
    """How many words hold a row, where ``count`` codes are cut into rows of whole words."""
    return -(-count // (rows * digits_per_word(CODES)))


class _Reference:
    def encode(
        self,
        grads: list[Tensor],
        bounds: Tensor,
        indices: Sequence[int],
        *,
        seed: int,
        step: int,
        antithetic: bool = False,
    ) -> Tensor:
        step_tensor = torch.tensor(step, device=bounds.device)
        each = zip(grads, bounds, indices, strict=True)
        return torch.cat(
            [encode(g, t, seed=seed, index=k, step=step_tensor, antithetic=antithetic) for g, t, k in each]
        )

    def pack(self, codes: Tensor, rows: int) -> Tensor:
        shard = code_words(codes.numel(), rows) * digits_per_word(CODES)
        return pack(torch.nn.functional.pad(codes, (0, rows * shard - codes.numel())).view(rows, shard), CODES)

    def add(self, words: Tensor) -> Tensor:
        ranks, shard = words.shape[0], words.shape[1] * digits_per_word(CODES)
        return pack(unpack(words, CODES, shard).sum(0, keepdim=True, dtype=torch.int64), 2 * ranks + 1)[0]

    def decode(self, words: Tensor, units: Tensor, grads: list[Tensor]) -> None:
        ranks, sizes = words.shape[0], [grad.numel() for grad in grads]
        shard = code_words(sum(sizes), ranks) * digits_per_word(CODES)
        sums = unpack(words, 2 * ranks + 1, shard).flatten()[: sum(sizes)].to(torch.float64).sub_(ranks * ZERO_CODE)
        for grad, part, unit in zip(grads, torch.split_with_sizes(sums, sizes), units, strict=True):
            grad.copy_(part * unit)


class _Kernels:
    def encode(
        self,
        grads: list[Tensor],
        bounds: Tensor,
        indices: Sequence[int],
        *,
        seed: int,
        step: int,
        antithetic: bool = False,
    ) -> Tensor:
        out: Tensor = torch.ops.csgd_cuda.encode_codes(
            grads, bounds, indices, seed=signed_seed(seed), step=step, antithetic=antithetic
        )
        return out

    def pack(self, codes: Tensor, rows: int) -> Tensor:
        out: Tensor = torch.ops.csgd_cuda.pack_codes(codes, rows)
        return out

    def add(self, words: Tensor) -> Tensor:
        out: Tensor = torch.ops.csgd_cuda.add_codes(words)
        return out

    def decode(self, words: Tensor, units: Tensor, grads: list[Tensor]) -> None:
        torch.ops.csgd_cuda.decode_sums(words, units, grads)


_REFERENCE, _KERNELS = _Reference(), _Kernels()


def choose_coding(device: torch.device, fused: bool | None) -> Coding:
    """The operations for gradients on a device. ``fused``: as in ``CSGD``.

    Raises:
        RuntimeError: fused is True and there is no kernel; it says why.
    """
    return _REFERENCE if choose_backend(device, fused).name == "reference" else _KERNELS


def _fake_encode(
    grads: list[Tensor], bounds: Tensor, indices: Sequence[int], *, seed: int, step: int, antithetic: bool = False
) -> Tensor:  # fmt: skip
    return bounds.new_empty(sum(grad.numel() for grad in grads), dtype=torch.uint8)


def _fake_pack(codes: Tensor, rows: int) -> Tensor:
    return codes.new_empty((rows, code_words(codes.numel(), rows)), dtype=torch.int32)


def _fake_add(words: Tensor) -> Tensor:
    return words.new_empty(words_for(words.shape[1] * digits_per_word(CODES), 2 * words.shape[0] + 1))


if extension.build_info() is not None:
    torch.library.register_fake("csgd_cuda::encode_codes", _fake_encode)
    torch.library.register_fake("csgd_cuda::pack_codes", _fake_pack)
    torch.library.register_fake("csgd_cuda::add_codes", _fake_add)
    torch.library.register_fake("csgd_cuda::decode_sums", lambda words, units, grads: None)
