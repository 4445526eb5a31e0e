# SPDX-License-Identifier: Apache-2.0
"""The drawing of the modules in docs/source.md is the package's: all modules are in it, and imports go down only."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "csgd_cuda"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def drawn_floors():
    """{module: floor} of the drawing; a line without a number goes on with the floor above it."""
    (drawing,) = re.findall(
        r"```text\n(9 .*?)```", (ROOT / "docs" / "source.md").read_text(encoding="utf-8"), re.DOTALL
    )
    floors, floor = {}, None
    for line in drawing.splitlines():
        number, names = re.match(r"(\d*)\s+(.*)", line).groups()
        floor = int(number) if number else floor
        for name in re.findall(r"[\w.]+", names):
            if name in MODULES:
                assert name not in floors, name
                floors[name] = floor
    return floors


def imports_of(path):
    """The modules of the package that a file imports when it runs, not only for types."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.level:
                folder = path.parent if child.level == 1 else path.parents[child.level - 1]
                parts = [*folder.relative_to(PACKAGE).parts, *(child.module or "").split(".")]
                module = ".".join(part for part in parts if part)
                names = {f"{module}.{alias.name}".lstrip(".") for alias in child.names} | {module}
                found.update(names & set(MODULES))
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_module_is_drawn_once():
    assert set(drawn_floors()) == set(MODULES)


def test_imports_go_down():
    floors = drawn_floors()
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imports_of(path)
        if floors[other] >= floors[name]
    ]
    assert not upward


def test_some_imports_are_found():
    """Or the test above could not fail."""
    assert {"optim.plan", "optim.direction", "pruning.groups"} <= imports_of(MODULES["optim.base"])
    assert "optim.base" in imports_of(MODULES["optim.csgd"])


# The programs

PROGRAMS = ("benchmarks", "examples", "experiments")


def roots_imported(path):
    """The first names of what a file imports from outside of its package, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def modules_beside(folder):
    """What files of the folder must not import: the other programs, and their modules by a path of their own."""
    others = [name for name in PROGRAMS if name != folder]
    return set(others).union(*({path.stem for path in (ROOT / name).iterdir()} for name in others))


def test_benchmarks_examples_and_experiments_import_nothing_of_each_other_nor_the_package_of_them():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for folder in ("csgd_cuda", "tools", *PROGRAMS)
        for path in (ROOT / folder).rglob("*.py")
        for other in roots_imported(path) & modules_beside(folder)
    ]
    assert not wrong


def test_an_example_is_a_file_that_can_be_copied():
    own = {path.stem for path in ROOT.iterdir()} | {path.stem for path in (ROOT / "examples").iterdir()}
    for path in (ROOT / "examples").iterdir():
        assert path.is_file(), path
        assert roots_imported(path) & own == {"csgd_cuda"}, path
