# SPDX-License-Identifier: Apache-2.0
"""tools/try_versions.py, with a stand-in for each Python: what it tries, and what its rows say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import try_versions as versions

ROOT = versions.ROOT
# Answers as a Python does, and notes what it is called with. What its environment names by a word of the call fails.
STAND_IN = """#!/bin/sh
case "$*" in
  *Py_GIL_DISABLED*) echo '{"version": "%s", "free_threaded": %s}'; exit;;
  "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit;;
esac
echo "$*" >>"$CALLS"
for word in $FAILING; do case "$*" in *"$word"*)
  echo "ERROR: $word is broken"; echo "$SAID"; echo "see above"; exit 1;;
esac; done
case "$*" in
  *load_error*) echo "a warning"; echo "$ABOUT";;
  "-m pytest"*) printf "%%s" "$REPORT" >tests.xml; case "$REPORT" in *failure*) exit 1;; esac;;
esac
"""
ABOUT = '{"torch": "2.14.1+cpu", "gil": true, "built": {"cuda": null}, "error": null}'
CASE = '<testcase classname="tests.rule.test_%s" name="test_it">%s</testcase>'
PASSED = CASE % ("one", "") + CASE % ("two", "") + CASE % ("three", "<skipped/>")
FAILED = CASE % ("four", "<failure/>")
DATE = r"\d{4}-\d{2}-\d{2}"


def stand_in(folder, version, free_threaded="false"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("python" + ".".join(version.split(".")[:2]) + ("t" if free_threaded == "true" else ""))
    path.write_text(STAND_IN % (version, free_threaded))
    path.chmod(0o755)
    return path


class Machine:
    """One with Python 3.10.13 and 3.13.0, on which pip has each torch."""

    def __init__(self, folder, monkeypatch):
        self.bin, self.out, self._calls = folder / "bin", folder / "out", folder / "calls"
        self._monkeypatch = monkeypatch
        for version in ("3.10.13", "3.13.0"):
            stand_in(self.bin, version)
        monkeypatch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")
        monkeypatch.setenv("PYENV_ROOT", str(folder / "pyenv"))
        monkeypatch.setenv("CALLS", str(self._calls))

    def run(self, *arguments, failing="", about=ABOUT, cases=PASSED):
        """The exit status."""
        report = f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
        for name, value in {"FAILING": failing, "ABOUT": about, "REPORT": report}.items():
            self._monkeypatch.setenv(name, value)
        self._calls.write_text("")
        # Those of the machine that runs this test would be found, too.
        pythons = [] if "--pythons" in arguments else ["--pythons", *map(str, sorted(self.bin.glob("python*")))]
        return versions.main(["--out", str(self.out), *pythons, *arguments])

    def results(self):
        """{name: result}, in the order of the rows."""
        return {row["name"]: row["result"] for row in self.rows()}

    def rows(self):
        return json.loads((self.out / "versions.json").read_text())

    def calls(self, word=""):
        return [line for line in self._calls.read_text().splitlines() if word in line and line.startswith("-m")]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


NEWEST = ["--only", "py3.13-torch2.14.1"]
NAMES = [f"py{python}-torch{torch}" for python in ("3.10", "3.13") for torch in ("2.11.0", "2.14.1")]


# What is tried


def test_oldest_and_newest_are_tried_first():
    pythons = [versions.Python("", version, False) for version in ("3.10.1", "3.11.1", "3.12.1")]
    planned = [combination.name for combination in versions.plan(pythons, ["2.11.0", "2.13.0"])]
    assert planned[:2] == ["py3.10-torch2.11.0", "py3.12-torch2.13.0"]
    assert sorted(planned) == sorted(
        f"py3.{python}-torch{torch}" for python in (10, 11, 12) for torch in ("2.11.0", "2.13.0")
    )
    assert [combination.name for combination in versions.plan(pythons[:1], ["2.11.0"])] == planned[:1]
    assert [combination.name for combination in versions.plan(pythons[:1], ["2.11.0", "2.11.0"])] == planned[:1]


def test_pythons_of_path_and_pyenv_are_found(machine, tmp_path, monkeypatch):
    """Of a minor version the first one; none that is too old, and none that does not run."""
    for version in ("3.9.18", "3.12.1"):
        stand_in(tmp_path / "pyenv" / "versions" / version / "bin", version)
    first = stand_in(tmp_path / "first", "3.13.5")
    stand_in(tmp_path / "first", "3.13.5", free_threaded="true")
    (tmp_path / "first" / "python3.14").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "first" / "python3.14").chmod(0o755)
    (tmp_path / "first" / "python3.13-config").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'first'}:{machine.bin}")
    found = versions.pythons_here()
    assert [python.name for python in found] == ["3.10", "3.12", "3.13", "3.13t"]
    assert found[2].path == str(first)


def test_quick_tests_are_there():
    for place in versions.QUICK_TESTS:
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (ROOT / file).read_text(), re.MULTILINE), place


@pytest.mark.parametrize("python", ["3.10", "3.14"])
def test_each_package_that_is_needed_is_pinned_once(python):
    pinned = map(Requirement, versions.pins((ROOT / "requirements-dev.txt").read_text()))
    names = [pin.name for pin in pinned if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert sorted(names) == sorted(versions.NEEDED)


WRONG = {
    "none": (["--pythons", "/none"], "--pythons: /none does not run as a Python; name an interpreter such as"),
    "no Python": (["--pythons", "/bin/true"], "--pythons: /bin/true does not run as a Python"),
    "another answer": (["--pythons", "/bin/echo"], "--pythons: /bin/echo does not run as a Python"),
    "keep": (["--keep", "/dev/null/folder"], "/dev/null/folder: Not a directory; name another path"),
    "old": (["--pythons", "OLD"], "is Python 3.9.18, and csgd_cuda needs 3.10 or later"),
    "torch": (["--torches", "2.13"], "--torches: '2.13' is no release of torch; write it as 2.13.0"),
    "only": (["--only", "py3.9-torch2.1.0"], "--only: 'py3.9-torch2.1.0' is no combination of what is here; there"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(machine, tmp_path, capsys, arguments, message):
    old = stand_in(tmp_path / "old", "3.9.18")
    assert machine.run(*[str(old) if word == "OLD" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert machine.calls() == []


@pytest.mark.parametrize("content", ["[", "[1]", '{"a": 1}', '[{"name": "a", "kernels": "CPU"}]'])
def test_damaged_results_are_left_as_they_are(content, machine, capsys):
    machine.out.mkdir()
    (machine.out / "versions.json").write_text(content)
    assert machine.run() == 2
    assert "versions.json is damaged" in capsys.readouterr().err
    assert (machine.out / "versions.json").read_text() == content


def test_a_folder_that_cannot_be_made_is_named(machine, capsys):
    machine.out.write_text("")
    assert machine.run() == 2
    assert f"{machine.out}: File exists; name another path." in capsys.readouterr().err


def test_without_any_python_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(versions, "pythons_here", list)
    assert versions.main(["--out", str(tmp_path)]) == 2
    assert "name one with --pythons" in capsys.readouterr().err


def test_declared_pythons_are_those_of_the_table():
    page = (ROOT / "docs" / "compatibility.md").read_text().split("## Pythons and releases of torch")[1]
    rows = re.findall(rf"^\| (3\.\d+)\.\d+ \| \S+ \| [1-9]\d* \| 0 \| \d+ \| {DATE} \|$", page, re.MULTILINE)
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert declared == sorted(set(rows), key=versions.numbers)


# The rows


def test_a_combination_is_a_row(machine, capsys):
    assert machine.run(*NEWEST) == 0
    line = rf"\| 3.13.0 \| 2.14.1\+cpu \| CPU \| 2 \| 0 \| 1 \| \d, \d, \d \| {DATE} \| passed \|"
    assert re.search(line, capsys.readouterr().out)
    assert re.search(line, (machine.out / "versions.md").read_text())
    assert sorted(path.name for path in machine.out.iterdir()) == [
        "py3.13-torch2.14.1.log", "versions.json", "versions.md",
    ]  # fmt: skip
    assert [call.split()[1] for call in machine.calls()] == ["pip", "pip", "pip", "pytest"]
    assert machine.calls("torch==2.14.1 numpy==")
    assert machine.calls("-m pytest")[0].endswith(" ".join(versions.QUICK_TESTS))


def test_environments_can_be_kept(machine, tmp_path):
    keep = ["--keep", str(tmp_path / "kept")]
    assert machine.run(*NEWEST, *keep) == 0
    assert (tmp_path / "kept" / "py3.13-torch2.14.1" / "bin" / "python").exists()


def test_what_has_a_row_is_not_tried_again(machine, capsys):
    assert machine.run("--torches", "2.14.1") == 0
    before = machine.rows()
    assert machine.run("--torches", "2.11.0", "2.14.1") == 0
    assert "py3.13-torch2.14.1 (2 of 4): its row is there" in capsys.readouterr().out
    assert not machine.calls("2.14.1")
    assert [row for row in machine.rows() if row["name"].endswith("2.14.1")] == before
    assert list(machine.results()) == NAMES
    assert machine.run("--torches", "2.14.1", "--again") == 0
    assert machine.results() == dict.fromkeys(NAMES, "passed")


def test_an_interrupted_call_leaves_its_rows(machine, monkeypatch, capsys):
    run = versions.Trial.run

    def interrupted(trial):
        if len(list(machine.out.glob("*.log"))) == 2:
            raise KeyboardInterrupt
        return run(trial)

    monkeypatch.setattr(versions.Trial, "run", interrupted)
    assert machine.run() == 130
    assert machine.results() == {"py3.10-torch2.11.0": "passed"}
    assert "repeat the command to go on" in capsys.readouterr().err


def test_a_torch_that_there_is_not_for_a_python_is_a_row_and_no_failure(machine, monkeypatch):
    said = (
        "ERROR: Could not find a version that satisfies the requirement torch==2.11.0 (from versions: 2.13.0, 2.14.1)"
    )
    monkeypatch.setenv("SAID", said)
    assert machine.run("--torches", "2.11.0", "2.14.1", failing="torch==2.11.0") == 0
    assert list(machine.results().values()) == ["no torch 2.11.0 for this Python", "passed"] * 2


@pytest.mark.parametrize("said", ["ERROR: no network", "requirement torch==2.11.0 (from versions: none)"])
def test_what_could_not_be_installed_fails_and_is_tried_again(said, machine, monkeypatch, capsys):
    """Without a network pip has no versions of anything."""
    monkeypatch.setenv("SAID", said)
    assert machine.run("--torches", "2.11.0", "2.14.1", failing="torch==2.11.0") == 1
    assert list(machine.results()) == [name for name in NAMES if "2.14.1" in name]
    assert "to be tried again: py3.10-torch2.11.0, py3.13-torch2.11.0" in capsys.readouterr().out
    assert machine.run("--torches", "2.11.0", "2.14.1") == 0
    assert machine.results() == dict.fromkeys(NAMES, "passed")


def test_where_a_pin_does_not_fit_the_newest_that_does_is_taken(machine):
    assert machine.run(*NEWEST, failing="setuptools==") == 0
    assert machine.calls("torch==2.14.1 --upgrade")[-1].endswith(" --upgrade setuptools")
    assert machine.calls("torch==2.14.1 pytest==")[-1].endswith(" pytest==9.0.3")


@pytest.mark.parametrize(
    ("trouble", "result"),
    [
        ({"failing": "--no-deps"}, "not built: --no-deps is broken"),
        ({"about": ABOUT.replace('{"cuda": null}', "null").replace('"error": null', '"error": "no file"')},
         "not loaded: no file"),
        ({"failing": "-q"}, "not tested: -q is broken"),
        ({"cases": CASE % ("three", "<skipped/>")}, "not tested: no test ran"),
        ({"cases": PASSED + FAILED}, "failed: rule.test_four.test_it"),
        ({"cases": FAILED * 4}, f"failed: {'rule.test_four.test_it, ' * 3}..."),
    ],
)  # fmt: skip
def test_a_failure_is_a_row_and_the_others_go_on(machine, trouble, result):
    assert machine.run("--torches", "2.14.1", **trouble) == 1
    assert list(machine.results().values()) == [result] * 2
    assert machine.run("--torches", "2.14.1") == 1  # what failed has a row, too
    assert not machine.calls()


def test_a_python_without_gil_says_whether_it_has_one(machine):
    path = stand_in(machine.bin, "3.14.2", free_threaded="true")
    assert machine.run("--pythons", str(path), "--torches", "2.14.1") == 0
    assert [(row["name"], row["python"]) for row in machine.rows()] == [
        ("py3.14t-torch2.14.1", "3.14.2, free-threaded, GIL on")
    ]


def test_counts_are_those_of_pytest(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
        "@pytest.mark.parametrize('x', [1, 2])\ndef test_more(x): pass\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=tests.xml", "."]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, check=False).returncode == 1
    counts, failures = versions.results_of((tmp_path / "tests.xml").read_text())
    assert counts == {"passed": 3, "failed": 2, "skipped": 1}
    assert failures == ["test_some.test_wrong", "test_some.test_error"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("ERROR: a\nERROR: b for torch==9\n\nnotice\n", "b for torch==9"),
        ("  a.cpp:4:1: error: no such thing\nRuntimeError: of ninja\nERROR: Failed to build it\n",
         "a.cpp:4:1: error: no such thing"),
        ("  ValueError: a wrong pyproject.toml\n  [end of output]\nerror: metadata-generation-failed\nhint: above\n",
         "ValueError: a wrong pyproject.toml"),
        ("ERROR: Cannot install a and b\nthis and that\nERROR: ResolutionImpossible: for help visit\n",
         "Cannot install a and b"),
        ("one\ntwo\n\n", "two"),
        ("", "it printed nothing"),
    ],
)  # fmt: skip
def test_reason_is_the_error_that_says_most(output, reason):
    assert versions.reason_in(output) == reason
