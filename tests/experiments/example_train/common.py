# SPDX-License-Identifier: Apache-2.0
"""What the tests of examples/train.py share; importing it makes the program importable."""

import sys
from pathlib import Path

import torch

from ...helpers import assert_same_bits

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import train


def assert_same(a, b, where="checkpoint"):
    """Containers with the same keys, numbers and raw bits; what was measured with a clock may differ."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert_same_bits(a, b, where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"ms_per_step"}:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def load(path):
    return torch.load(path, weights_only=True)


def refused(capsys, argv, *words):
    """Exit status 2 and one sentence on stderr with all these words in it."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert str(word) in message
    assert message.startswith("train.py: error: ")
    assert message.count("\n") == 1
    assert message.endswith(".\n")
