# SPDX-License-Identifier: Apache-2.0
"""What a rank computes in an exchange: codes packed into words, added up, and decoded.

- Words hold as many digits of a base as fit in 32 bits: 20 codes of three values (1.6 bits each, where two bits would
  hold four values), 13 sums of two ranks (2.5 bits) or 10 sums of four (3.2 bits).
- ``Coding`` is the operations on codes (codes.py): the kernels' operators where there are any, else pure PyTorch,
  with the same bits. A row of codes for each of W shards, of which a shard is a multiple of 20 codes; sums of W codes,
  plus W, have the radix 2 W + 1.
- Most codes are 0, and many sums. Rows of words can travel as planes of bits (planes.py), which take fewer bytes
  then; how many depends on the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import extension
from ..optim.options import signed_seed
from ..tensors import divided
from .codes import CODES, ZERO_CODE, encode
from .planes import from_planes, to_planes

BYTES_PER_WORD = 4
_WORD_RANGE = 2**32


def digits_per_word(radix: int) -> int:
    """The largest k with radix^k <= 2^32.

    Raises:
        ValueError: ``radix`` is not in 2 ... 2^32.
    """
    if not 2 <= radix <= _WORD_RANGE:
        raise ValueError(f"radix must be in 2 ... 2^32, got {radix}")
    count, power = 0, radix
    while power <= _WORD_RANGE:
        count, power = count + 1, power * radix
    return count


def words_for(count: int, radix: int) -> int:
    """How many words hold ``count`` digits."""
    return -(-count // digits_per_word(radix))


def pack(digits: Tensor, radix: int) -> Tensor:
    """Each row of digits as words: digit j of word w is the row's digit j * words + w, absent ones are 0.

    With that order neighbours in memory belong to neighbouring words, for vector units and GPUs.

    Args:
        digits: integers in [0, radix), shape (rows, count).

    Returns:
        int32 of shape (rows, words_for(count, radix)), the bits of unsigned words.
    """
    rows, count = digits.shape
    places, words = digits_per_word(radix), words_for(count, radix)
    padded = torch.nn.functional.pad(digits, (0, places * words - count)).view(rows, places, words)
    value = torch.zeros(rows, words, dtype=torch.int64, device=digits.device)
    for place in range(places - 1, -1, -1):
        value.mul_(radix).add_(padded[:, place])
    return value.to(torch.int32)


def unpack(words: Tensor, radix: int, count: int) -> Tensor:
    """The digits that were packed.

    Args:
        words: int32 of shape (rows, words_for(count, radix)).

    Returns:
        Digits of shape (rows, count): uint8 where the radix allows it, else int64.
    """
    places = digits_per_word(radix)
    dtype = torch.uint8 if radix <= 256 else torch.int64
    out = torch.empty(words.shape[0], places, words.shape[1], dtype=dtype, device=words.device)
    # float64 divides vectors, int64 does not; the floor of a quotient of integers below 2^53 is exact.
    value = words.to(torch.int64).bitwise_and_(_WORD_RANGE - 1).to(torch.float64)
    for place in range(places):
        quotient = divided(value, radix).floor_()
        out[:, place] = value.sub_(quotient * radix)
        value = quotient
    return out.flatten(1)[:, :count]


class Coding(Protocol):
    """The operations, of the kernels or of the reference."""

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
                not finite the codes are arbitrary.
            indices: 0 ... 2^32 - 1, different for each gradient and pair of ranks, so that their draws differ.
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

    def write_rows(self, words: Tensor, most: int) -> list[Tensor]:
        """Each row of packed sums as bytes: its planes (planes.py), or its words where these take no more.

        Args:
            words: int32 of shape (rows, words), with the radix 2 most + 1.

        Returns:
            uint8 of shape (bytes,) for each row.
        """

    def read_rows(self, messages: list[Tensor], words: int, most: int) -> Tensor:
        """The packed rows, of so many words each, that were written: int32 of shape (rows, words).

        Raises:
            ValueError: a row has not the bytes that its planes take.
        """

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

    def write_rows(self, words: Tensor, most: int) -> list[Tensor]:
        count = words.shape[1] * digits_per_word(2 * most + 1)
        each = [(to_planes(unpack(row[None], 2 * most + 1, count)[0], most), row.view(torch.uint8)) for row in words]
        return [planes if len(planes) < len(row) else row for planes, row in each]

    def read_rows(self, messages: list[Tensor], words: int, most: int) -> Tensor:
        out = messages[0].new_empty((len(messages), words), dtype=torch.int32)
        for row, message in zip(out, messages, strict=True):
            if len(message) == BYTES_PER_WORD * words:
                row.view(torch.uint8).copy_(message)
            else:
                count = words * digits_per_word(2 * most + 1)
                row.copy_(pack(from_planes(message, count, most)[None], 2 * most + 1)[0])
        return out

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

    def write_rows(self, words: Tensor, most: int) -> list[Tensor]:
        rows, lengths = torch.ops.csgd_cuda.write_rows(words, most)
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def read_rows(self, messages: list[Tensor], words: int, most: int) -> Tensor:
        lengths = [len(message) for message in messages]
        out: Tensor = torch.ops.csgd_cuda.read_rows(torch.cat(messages), lengths, words, most)
        return out

    def decode(self, words: Tensor, units: Tensor, grads: list[Tensor]) -> None:
        torch.ops.csgd_cuda.decode_sums(words, units, grads)


_REFERENCE, _KERNELS = _Reference(), _Kernels()


def choose_coding(device: torch.device, fused: bool | None) -> Coding:
    """The operations for gradients on a device. ``fused``: as in ``CSGD``.

    Raises:
        RuntimeError: fused is True and there is no kernel; it says why.
    """
    return _REFERENCE if not extension.takes_kernel(device, fused) else _KERNELS


def _fake_encode(
    grads: list[Tensor], bounds: Tensor, indices: Sequence[int], *, seed: int, step: int, antithetic: bool = False
) -> Tensor:  # fmt: skip
    return bounds.new_empty(sum(grad.numel() for grad in grads), dtype=torch.uint8)


def _fake_pack(codes: Tensor, rows: int) -> Tensor:
    return codes.new_empty((rows, code_words(codes.numel(), rows)), dtype=torch.int32)


def _fake_add(words: Tensor) -> Tensor:
    return words.new_empty(words_for(words.shape[1] * digits_per_word(CODES), 2 * words.shape[0] + 1))


def _fake_write_rows(words: Tensor, most: int) -> tuple[Tensor, Tensor]:
    rows = words.new_empty((words.shape[0], words.shape[1] * BYTES_PER_WORD), dtype=torch.uint8)
    return rows, words.new_empty(words.shape[:1], dtype=torch.int64)


def _fake_read_rows(message: Tensor, lengths: Sequence[int], words: int, most: int) -> Tensor:
    return message.new_empty((len(lengths), words), dtype=torch.int32)


if extension.build_info() is not None:
    torch.library.register_fake("csgd_cuda::encode_codes", _fake_encode)
    torch.library.register_fake("csgd_cuda::pack_codes", _fake_pack)
    torch.library.register_fake("csgd_cuda::add_codes", _fake_add)
    torch.library.register_fake("csgd_cuda::write_rows", _fake_write_rows)
    torch.library.register_fake("csgd_cuda::read_rows", _fake_read_rows)
    torch.library.register_fake("csgd_cuda::decode_sums", lambda words, units, grads: None)
