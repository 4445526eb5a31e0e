# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md is no staler than pins and tests: its versions, files and optimizers are theirs."""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| integration", "| ---"))
]


def pins():
    """{distribution: version}: of torch and of the extra. tomllib would need Python 3.11."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^test-integration = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE).group(1)
    lines = re.findall(r'^\s*"(.*?)"', extra, re.MULTILINE)
    lines += re.findall(r"^torch==.*", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return {r.name: r for r in map(Requirement, lines)}


def version_of(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def test_versions_of_the_table_are_the_pinned_ones():
    assert len(TABLE) > 10
    pinned = {name: version_of(requirement) for name, requirement in pins().items()}
    named = dict(row[1].split() for row in TABLE)
    assert {row[1] for row in TABLE} == {f"{name} {version}" for name, version in named.items()}, "two versions of one"
    assert named == {name: version for name, version in pinned.items() if name != "torchvision"}  # only timm's need


def file_of(row):
    return (HERE / row[4].strip("`")).resolve()


def test_table_names_every_file_and_no_other():
    named = {file_of(row) for row in TABLE}
    assert all(path.is_file() for path in named)
    assert {path for path in named if path.parent == HERE} == {*HERE.glob("test_*.py")} - {Path(__file__)}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_table_says_which_optimizers_a_file_tests(row):
    """Both, where a test takes the fixture or names the second one."""
    of_both = re.compile(r"\boptimizer_class\):|\bCalibratedAdamW\b|\bOPTIMIZERS\b")
    assert row[2] == ("both" if of_both.search(file_of(row).read_text(encoding="utf-8")) else "CSGD")


@pytest.mark.parametrize("name", sorted(pins()))
def test_installed_version_is_the_pinned_one(name):
    """What ran is what the table says. make test-integration must not pass for want of a package."""
    requirement = pins()[name]
    if requirement.marker is not None and not requirement.marker.evaluate():
        pytest.skip(f"not for this Python: {requirement.marker}")
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        assert os.environ.get("CSGD_CUDA_INTEGRATION") != "1", f"{name} is not installed"
        pytest.skip(f"{name} is not installed: make test-integration")
    if os.environ.get("CSGD_CUDA_INTEGRATION") == "1":  # make test runs with other versions, too
        assert installed.split("+")[0] == version_of(requirement)
