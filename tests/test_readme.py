# SPDX-License-Identifier: Apache-2.0
"""What the README shows is so: its code runs, and its ten lines are the optimizer."""

import re
from pathlib import Path

import torch

from csgd_cuda import CSGD

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]+_TABLE\b", README)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_quick_start_runs(capsys):
    (block,) = (b for b in BLOCKS if "optimizer.density()" in b)
    run(block)
    shares = eval(capsys.readouterr().out)
    assert len(shares) == 4
    assert all(0 <= share <= 1 for share in shares)
    assert any(shares)


def test_first_page_of_the_documentation_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    run(block)
    shares, bounds = map(eval, capsys.readouterr().out.splitlines())
    assert len(shares) == len(bounds) == 2
    assert all(bounds)


def test_ten_lines_are_equivalent():
    """Bound and momentum agree to rounding; of the parameter, the distribution: density, and mean over seeds."""
    (block,) = (b for b in BLOCKS if "def csgd_step" in b)
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
