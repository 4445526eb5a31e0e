# SPDX-License-Identifier: Apache-2.0
"""README and docs/ tell the truth: their code runs, their links lead somewhere, their tables of options are CSGD's."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW, PruningOptions

from .distributed import launch
from .helpers import DOCS, code_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*(ROOT / name / "README.md" for name in (".", "benchmarks", "experiments")), *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"```.*?```", re.DOTALL)


def prose_of(path):
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def name_of(path):
    return str(path.relative_to(ROOT))


# The text


def test_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_placeholder_is_left(path):
    assert not re.findall(r"\b[A-Z]+_TABLE\b", path.read_text(encoding="utf-8"))


def anchors_of(path):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_pictures_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.is_file(), target
        assert not anchor or anchor in anchors_of(page), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_files_of_the_repository_that_are_named_exist(path):
    for named in re.findall(
        r"`((?:csgd_cuda|csrc|tests|benchmarks|experiments|examples|docs|tools)/[\w./*-]+)`", prose_of(path)
    ):
        assert any(ROOT.glob(named.rstrip("/"))), named


NAMED_TESTS = {path: re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", prose_of(path)) for path in PAGES}


@pytest.mark.parametrize("path", [path for path in PAGES if NAMED_TESTS[path]], ids=name_of)
def test_tests_that_are_named_exist(path):
    for file, name in NAMED_TESTS[path]:
        assert (ROOT / file).is_file(), file
        assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{file}::{name}"
        )


def test_every_promise_names_a_test():
    _, table = (DOCS / "reliability.md").read_text(encoding="utf-8").split("## Promises")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", table, re.MULTILINE)
    promises = [row for row in rows if "`tests/" in row[1]]
    assert len(promises) > 40
    assert [row for row in rows if row not in promises and row[1] not in ("test", "---")] == []


def test_readme_shows_a_picture():
    assert re.findall(r"!\[.+?\]\(.+?\)", README)


# The tables of options


def options_in(path):
    """{name: default} of the rows of a table of options, whose second to last column is the default."""
    options = {}
    for row in re.findall(r"^\| (`\w+`.*)\|$", path.read_text(encoding="utf-8"), re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        try:
            default = ast.literal_eval(cells[-2].strip("`"))
        except (SyntaxError, ValueError):  # a row of another table
            continue
        options.update(dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), default))
    return options


def options_of_signature(optimizer_class=CSGD):
    parameters = inspect.signature(optimizer_class).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "params" and p.kind is not p.VAR_KEYWORD}


def test_options_of_the_readme_are_those_of_the_optimizer():
    options = options_in(ROOT / "README.md")
    assert options.pop("sparsity") == CSGD([torch.zeros(1)]).defaults["sparsity"]
    assert options == options_of_signature()


def test_page_of_options_has_those_of_the_optimizer_in_order():
    assert list(options_in(DOCS / "options.md").items()) == list(options_of_signature().items())


def test_page_of_adamw_has_the_options_that_csgd_lacks():
    of_csgd = list(options_of_signature().items())
    calibration = next(place for place, (name, _) in enumerate(of_csgd) if name == "calibration")
    own = list(options_in(DOCS / "adamw.md").items())
    assert own + of_csgd[calibration:] == list(options_of_signature(CalibratedAdamW).items())


def test_page_of_pruning_has_its_options():
    defaults = CSGD([torch.zeros(1)]).defaults
    assert options_in(DOCS / "pruning.md") == {name: defaults[name] for name in PruningOptions.__annotations__}


# The code


def new_model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 4)
    )


def run(block, names=None):
    """Executes a block of code, in which a line of three dots stands for a training; the names it defines."""
    names = {} if names is None else names

    def train():
        names["model"](torch.randn(2, 3, 8, 8)).square().mean().backward()
        if "optimizer" in names:
            names["optimizer"].step()

    names["train"] = train
    exec(compile(re.sub(r"^\.\.\.$", "train()", block, flags=re.MULTILINE), "block", "exec"), names)
    return names


# The code of these needs several processes, or packages for which there are tests in tests/integration.
RUN_ELSEWHERE = ("distributed.md", "logging.md")


@pytest.mark.parametrize("path", [p for p in PAGES if code_of(p) and p.name not in RUN_ELSEWHERE], ids=name_of)
def test_code_of_a_page_runs_from_top_to_bottom(path):
    names = {"model": new_model()}
    for block in code_of(path):
        run(block, names)


def run_block_of_several_processes(rank, number):
    torch.manual_seed(0)
    model = new_model()
    names = {"torch": torch, "CSGD": CSGD, "model": model}
    block = code_of(DOCS / "distributed.md")[number]
    if "(optimizer)" in block:
        names["optimizer"] = CSGD(model.parameters(), lr=0.1)
    run(block + "\n...\n", names)


@pytest.mark.parametrize("number", range(len(code_of(DOCS / "distributed.md"))))
def test_code_for_several_processes_runs_on_two(number):
    launch.run(2, run_block_of_several_processes, number)


def test_quick_start_runs(capsys):
    run(code_of(DOCS / "options.md")[0])
    shares = eval(capsys.readouterr().out)
    assert len(shares) == 4
    assert all(0 <= share <= 1 for share in shares.values())
    assert any(shares.values())


def test_first_page_of_the_documentation_runs(capsys):
    (block,) = code_of(DOCS / "index.md")
    run(block)
    shares, bounds = map(eval, capsys.readouterr().out.splitlines())
    assert list(shares) == list(bounds) == ["weight", "bias"]
    assert all(bounds.values())


def test_ten_lines_are_equivalent():
    """Bound and momentum agree to rounding; of the parameter, the distribution: density, and mean over seeds."""
    (block,) = (b for b in code_of(ROOT / "README.md") if "def csgd_step" in b)
    csgd_step = run(block)["csgd_step"]
    torch.manual_seed(0)
    n, runs = 500, 200
    grads = [torch.randn(n, dtype=torch.float64).sign() * (0.2 + torch.rand(n)) for _ in range(3)]
    means, moved = [], []
    for ours in (True, False):
        total, count = torch.zeros(n, dtype=torch.float64), 0
        for seed in range(runs):
            param = torch.zeros(n, dtype=torch.float64, requires_grad=True)
            momentum_buffer, bound = torch.zeros(n, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
            optimizer = CSGD([param], lr=0.1, momentum=0.9, seed=seed)
            for grad in grads:
                before = param.detach().clone()
                if ours:
                    param.grad = grad
                    optimizer.step()
                else:
                    csgd_step(param, grad, momentum_buffer, bound, lr=0.1)
            total += param.detach()
            count += int((param != before).sum())
            if ours:
                state = optimizer.state[param]
                momentum_buffer, bound = state["momentum_buffer"], state["lipschitz_bound"]
        means.append(total / runs)
        moved.append(count / runs / n)
        moved.append((momentum_buffer, bound))
    torch.testing.assert_close(moved[1], moved[3], rtol=1e-12, atol=1e-12)
    assert abs(moved[0] - moved[2]) < 6 * (2 * 0.25 / (runs * n)) ** 0.5
    # Var per run: at most 3 steps of (lr * T / 2)^2; two means are compared.
    deviation = (2 * 3 / runs) ** 0.5 * 0.1 * bound.item() / 2
    assert (means[0] - means[1]).abs().max() < 6 * deviation
