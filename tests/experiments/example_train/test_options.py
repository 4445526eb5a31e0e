# SPDX-License-Identifier: Apache-2.0
"""The example program says what is wrong with an option."""

import pytest
import torch

from csgd_cuda import extension

from .common import refused, train  # isort: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "-1"], ["--lr", "'-1'", "at least 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--momentum", "much"], ["--momentum", "'much'"]),
        (["--epochs", "0"], ["--epochs", "'0'", "whole number of at least 1"]),
        (["--batch-size", "1.5"], ["--batch-size", "'1.5'"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--optimizers", "adam"], ["--optimizers", "'adam'"]),
        (["--optimizers", "csgd,csgd"], ["--optimizers", "'csgd,csgd'"]),
        (["--dtype", "float16"], ["--dtype", "'float16'"]),
        (["--device", "tpu"], ["--device tpu", "cuda:N"]),
        (["--device", "mps"], ["--device mps", "cuda:N"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--save", "nowhere/x.pt"], ["--save nowhere/x.pt", "does not exist"]),
        (["--save", "."], ["--save .", "is a directory"]),
        (["--out", __file__], ["--out", __file__, "cannot be created"]),
    ],
)
def test_bad_option_is_named(arguments, capsys, options, words):
    refused(capsys, arguments(*options), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    refused(capsys, ["--device", "cuda"], "--device cuda: this PyTorch", "use --device cpu")


def test_results_that_cannot_be_written_are_named(arguments, tmp_path, capsys):
    (tmp_path / "out" / "curves.csv").mkdir(parents=True)
    capsys.readouterr()
    assert train.main(arguments("--epochs", 1)) == 2
    captured = capsys.readouterr()
    assert "| CSGD " in captured.out
    assert f"train.py: error: --out {tmp_path / 'out'}: cannot be written" in captured.err


def test_fused_without_a_kernel_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(extension, "why_no_kernel", lambda device: "the kernel is on holiday")
    capsys.readouterr()
    assert train.main(arguments("--fused", "yes")) == 2
    message = capsys.readouterr().err
    assert "train.py: error: --fused yes: " in message
    assert "the kernel is on holiday" in message
