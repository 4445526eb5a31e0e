# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/install.md and of the README's Install run in a fresh environment, without a network."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .helpers import DOCS, ROOT, copy_sources

sys.path.insert(0, str(ROOT / "tools"))
import make_wheel

PAGES = {"README.md": ROOT / "README.md", "install.md": DOCS / "install.md"}


def blocks_of(page):
    """The blocks of commands of a page, without comments."""
    text = PAGES[page].read_text(encoding="utf-8")
    if page == "README.md":
        text = text.partition("\n## Install\n")[2].partition("\n## ")[0]
    found = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [re.sub(r" *#.*$", "", block, flags=re.MULTILINE) for block in found]


BLOCKS = [(page, block) for page in PAGES for block in blocks_of(page)]
OF_PIP = [(page, block) for page, block in BLOCKS if block.startswith("pip ")]


@pytest.fixture
def environment(tmp_path):
    """A folder with an environment that has torch, and the sources in `source`; the variables for commands there.

    pip finds nothing on a network, so that what it would install must be there; nothing is compiled.
    """
    python = make_wheel.fresh_environment(sys.executable, Path(torch.__file__).parents[1], tmp_path / "fresh")
    programs = python.parent
    (programs / "pip").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{python}" "$@"\n')
    (programs / "pip").chmod(stat.S_IRWXU)
    copy_sources(tmp_path / "source")
    of_pip = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return tmp_path, {"PATH": f"{programs}:/usr/bin:/bin", "CSGD_CUDA_BUILD": "none", "HOME": str(tmp_path), **of_pip}


@pytest.mark.long
@pytest.mark.parametrize(("page", "block"), OF_PIP, ids=[f"{page}-{n}" for n, (page, _) in enumerate(OF_PIP)])
def test_commands_of_pip_install_the_package(page, block, environment):
    folder, env = environment
    done = subprocess.run(
        ["bash", "-euc", block], cwd=folder / "source", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    used = subprocess.run(
        [folder / "fresh" / "bin" / "python", "-c", "import csgd_cuda; print(csgd_cuda.__file__)"],
        cwd=folder, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (folder / "fresh") in Path(used.stdout).parents
    if "show_config" in block:
        assert f"csgd_cuda with torch {torch.__version__}" in done.stdout


def test_other_commands_are_of_uv_or_targets_of_the_makefile():
    """uv would have to download torch; what `make` does has tests of its own."""
    assert len(OF_PIP) == 3
    for line in (line for pair in BLOCKS if pair not in OF_PIP for line in pair[1].splitlines()):
        program, *arguments = line.split()
        assert program in ("make", "uv")
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_uv_installs_the_same_as_pip():
    (of_uv,) = (block for _, block in BLOCKS if block.startswith("uv "))
    assert of_uv.replace("uv venv\n", "").replace("uv pip", "pip") == blocks_of("README.md")[0]
