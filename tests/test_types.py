# SPDX-License-Identifier: Apache-2.0
"""The stub of the compiled module names its functions and their arguments; a wheel carries it."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def arguments(function):
    """Names of the positional and of the keyword-only arguments, and how many of each have defaults."""
    a = function.args
    defaults = len(a.defaults), sum(default is not None for default in a.kw_defaults)
    return [arg.arg for arg in a.args], [arg.arg for arg in a.kwonlyargs], defaults


def test_stub_fits_the_compiled_module(compiled):
    stub = {
        node.name: node
        for node in ast.parse((ROOT / "csgd_cuda" / "_C.pyi").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    names = {name for name in dir(compiled) if not name.startswith("__")}
    assert names == set(stub)
    for name in names:
        if stub[name].args.vararg is None:  # else the arguments are those of an operator's schema
            # pybind11 writes the signature into the docstring
            signature = getattr(compiled, name).__doc__.splitlines()[0]
            assert arguments(stub[name]) == arguments(ast.parse(f"def {signature}: ...").body[0]), name


def test_wheel_carries_the_types(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csgd_cuda", source / "csgd_cuda", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('..')"],
        cwd=source, env={**os.environ, "CSGD_CUDA_BUILD": "none"}, capture_output=True, check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {"csgd_cuda/py.typed", "csgd_cuda/_C.pyi", "csgd_cuda/optim/csgd.py", "csgd_cuda/reference/step.py"} <= files
