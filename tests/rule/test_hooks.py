# SPDX-License-Identifier: Apache-2.0
"""The tests' own module of the compiled rule is made once, and not without a compiler."""

import pytest

from ..helpers import made_once
from . import hooks


def test_hooks_are_skipped_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="no C\\+\\+ compiler"):
        hooks.load()


def test_a_file_that_is_there_is_not_made_again(tmp_path):
    made = []

    def make(path):
        made.append(path)
        path.touch()

    for _ in range(2):
        assert made_once(tmp_path / "file", make) == tmp_path / "file"
    assert len(made) == 1


def test_what_failed_is_made_again(tmp_path):
    def fail(path):
        path.touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        made_once(tmp_path / "file", fail)
    assert not (tmp_path / "file").exists()
