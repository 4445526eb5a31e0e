# SPDX-License-Identifier: Apache-2.0
"""Train a small character-level transformer with AdamW and with CalibratedAdamW, in float32 and in pure bfloat16.

    python examples/char_lm.py                # sources of Python's standard library; 63 runs, many hours in all
    python examples/char_lm.py --data FILE --width 64 --layers 2 --steps 500 --seeds 0    # any text; a first look

In pure bfloat16 weights, gradients and both means of the optimizer are bfloat16, without float32 copies; so is all
arithmetic of the network but the softmax of the loss. All methods begin with the same weights, rounded to their dtype,
and get the same batches for the same seed. The validation loss is that of the trained weights, computed in float32 on
the last tenth of the text, which is not trained on; a character is a byte. A finished run is a line of runs.jsonl in
--out and is not repeated by a second call. table.md and curves.png show the runs of the grid that was asked for.
"""

import argparse
import copy
import hashlib
import json
import math
import shlex
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csgd_cuda import CalibratedAdamW

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    tqdm = None

MODULES = (  # of the standard library: 2.2 MB, and in every version of Python that is supported
    "_pydecimal inspect typing pydoc tarfile doctest argparse _pyio pickletools subprocess difflib locale enum mailbox "
    "ipaddress pickle pdb ast optparse dataclasses threading shutil configparser imaplib ssl statistics smtplib"
)
HEAD_WIDTH = 32
EVALUATIONS = 8  # A run computes the validation loss so many times, and once more before its first step.
EVALUATION_WINDOWS = 1024  # at most, at equal distances in the validation text


class Text(NamedTuple):
    name: str  # with its length and checksum
    vocabulary: int
    train: Tensor  # numbers in the vocabulary
    validation: Tensor


def load_text(path: str | None, context: int) -> Text:
    files = [Path(path)] if path else [Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in MODULES.split()]
    try:
        raw = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        sys.exit(f"char_lm.py: error: --data: {error.filename} cannot be read ({error.strerror}).")
    held_out = len(raw) // 10
    if held_out <= context:
        sys.exit(f"char_lm.py: error: --context {context}: a tenth of the text has only {held_out} characters.")
    characters, tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8).unique(return_inverse=True)
    name = Path(path).name if path else f"standard library of Python {sys.version_info[0]}.{sys.version_info[1]}"
    name = f"{name}, {len(raw):,} bytes, SHA-256 {hashlib.sha256(raw).hexdigest()[:12]}"
    return Text(name, len(characters), tokens[:-held_out], tokens[-held_out:])


class Block(nn.Module):
    """Causal attention and a two-layer network, each after a layer norm and added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """From characters to the scores of the next one; the embedding is the last layer, too."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # A product instead of a lookup, whose gradient torch would add up in bfloat16, rounding every addition.
        chosen = F.one_hot(tokens, len(self.embedding)).to(self.embedding.dtype)
        return self.norm(self.blocks(chosen @ self.embedding + self.position)) @ self.embedding.T


def loss_of(model: Transformer, tokens: Tensor, starts: Tensor) -> Tensor:
    """Mean over the windows that begin at ``starts``, of the prediction of every next character."""
    batch = tokens[starts[:, None] + torch.arange(len(model.position) + 1)]
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


class Method(NamedTuple):
    label: str
    dtype: torch.dtype
    calibration: float | None = None  # None: torch's AdamW

    def optimizer(self, model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
        if self.calibration is None:  # fused: computes in float32 and rounds each stored number once, to nearest
            return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        return CalibratedAdamW(model.named_parameters(), lr=lr, calibration=self.calibration, seed=seed)


METHODS = {"adamw-float32": Method("AdamW, float32", torch.float32)}
METHODS["adamw-bfloat16"] = Method("AdamW, bfloat16", torch.bfloat16)
for c in (0, 0.05, 0.25, 1, 4):
    METHODS[f"calibrated-{c:g}"] = Method(f"CalibratedAdamW, c = {c:g}, bfloat16", torch.bfloat16, c)


@torch.no_grad()
def validation_loss(model: Transformer, judge: Transformer, tokens: Tensor) -> float:
    """Of the model's weights, computed by ``judge``, the same network in float32."""
    judge.load_state_dict(model.state_dict())
    context = len(model.position)
    last = len(tokens) - context - 1
    starts = torch.linspace(0, last, min(EVALUATION_WINDOWS, last // context + 1), dtype=torch.float64).long()
    loss = float(sum(loss_of(judge, tokens, part) * len(part) for part in starts.split(64))) / len(starts)
    return loss if math.isfinite(loss) else math.inf


def train(method: Method, lr: float, seed: int, text: Text, args: argparse.Namespace, title: str) -> dict[str, Any]:
    """What a line of runs.jsonl says of the run."""
    torch.manual_seed(seed)
    judge = Transformer(text.vocabulary, args.context, args.width, args.layers)
    model = copy.deepcopy(judge).to(method.dtype)
    optimizer = method.optimizer(model, lr, seed)

    def schedule(step: int) -> float:  # rises over the first twentieth, then falls to 0 as a cosine does
        return min(1.0, 20 * (step + 1) / args.steps) * (1 + math.cos(math.pi * step / args.steps)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began, densities, curve = time.perf_counter(), [], [(0, validation_loss(model, judge, text.validation))]
    steps = range(1, args.steps + 1)
    for step in tqdm(steps, desc=title, leave=False, disable=None) if tqdm else steps:
        starts = torch.randint(len(text.train) - args.context, (args.batch_size,))
        optimizer.zero_grad()
        loss_of(model, text.train, starts).backward()
        optimizer.step()
        scheduler.step()
        if step * EVALUATIONS // args.steps > (step - 1) * EVALUATIONS // args.steps:
            curve.append((step, validation_loss(model, judge, text.validation)))
            if isinstance(optimizer, CalibratedAdamW):
                densities.append(optimizer.overall_density())
    stored = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    run = {"curve": curve, "density": sum(densities) / len(densities) if densities else None}
    run["parameters"] = sum(p.numel() for p in model.parameters())
    run["bytes_per_parameter"] = sum(x.numel() * x.element_size() for x in stored) / run["parameters"]
    return run | {"seconds": time.perf_counter() - began}


def finished(path: Path) -> list[dict[str, Any]]:
    """The lines of runs.jsonl. One that a killed program has not finished is taken off: its run is made again."""
    if not path.exists():
        return []
    whole, newline, torn = path.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        path.write_text(whole + newline, encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        sys.exit(f"char_lm.py: {path} is damaged ({error}); delete it, or name another --out.")


def train_missing(path: Path, settings: dict[str, Any], text: Text, args: argparse.Namespace) -> dict[Any, Any]:
    """All runs of the grid by method, learning rate and seed, those that the file lacks being trained and added."""
    runs = {(run["method"], run["lr"], run["seed"]): run for run in finished(path) if run["settings"] == settings}
    grid = [(name, lr, seed) for seed in args.seeds for lr in args.lrs for name in args.methods]
    for number, (name, lr, seed) in enumerate(grid, 1):
        if (name, lr, seed) not in runs:
            title = f"{number}/{len(grid)}: {METHODS[name].label}, lr {lr:g}, seed {seed}"
            run = train(METHODS[name], lr, seed, text, args, title)
            runs[name, lr, seed] = {"settings": settings, "method": name, "lr": lr, "seed": seed, **run}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[name, lr, seed]) + "\n")
            print(f"{title}: validation loss {run['curve'][-1][1]:.4f}, {run['seconds']:.0f} s", flush=True)
    return runs


def report(runs: dict[Any, Any], args: argparse.Namespace) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The table, and for each method its runs at its best learning rate."""

    def spread(values: Tensor, sign: str = "") -> str:  # mean and, of several, standard deviation
        return f"{values.mean():{sign}.4f}" + (f" ± {values.std():.4f}" if len(values) > 1 else "")

    header = ["method", "lr", "validation loss", "to the first row", "moved, %", "bytes per parameter"]
    rows = [header + [f"loss at lr {lr:g}" for lr in args.lrs], ["---"] + ["---:"] * (5 + len(args.lrs))]
    best, first = {}, None
    for name in args.methods:
        losses = torch.tensor([[runs[name, lr, seed]["curve"][-1][1] for seed in args.seeds] for lr in args.lrs])
        at = int(losses.mean(1).argmin())
        best[name] = [runs[name, args.lrs[at], seed] for seed in args.seeds]
        run, first = best[name][0], losses[at] if first is None else first
        row = [METHODS[name].label, f"{run['lr']:g}", f"**{spread(losses[at])}**", spread(losses[at] - first, "+")]
        row += ["" if run["density"] is None else f"{100 * run['density']:.1f}", f"{run['bytes_per_parameter']:.2f}"]
        rows.append(row + [spread(of_lr) for of_lr in losses])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows), best


def draw(best: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in best.items():
        curves = torch.tensor([run["curve"][1:] for run in runs])  # without the first loss, far above the others
        axes.plot(*curves.mean(0).T, marker=".", label=f"{METHODS[name].label}, lr {runs[0]['lr']:g}")
    axes.set(xlabel="step", ylabel="validation loss, nats per character (mean over seeds)")
    axes.set_title(title, fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    p.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3], help="default: %(default)s")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    sizes = {"steps": 2000, "batch_size": 32, "context": 128, "width": 128, "layers": 5, "threads": 1}
    for name, default in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    p.add_argument("--data", metavar="FILE", help="a text (default: the sources of Python's standard library)")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("out/char_lm"), help="default: %(default)s")
    args = p.parse_args(argv)
    for name in sizes:
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}.")
    if args.width % HEAD_WIDTH:
        p.error(f"--width must be a multiple of {HEAD_WIDTH}, got {args.width}.")
    for lr in args.lrs:
        if not 0 <= lr < math.inf:
            p.error(f"--lrs must be finite and 0 or more, got {lr}.")
    torch.set_num_threads(args.threads)
    text = load_text(args.data, args.context)
    settings = {name: getattr(args, name) for name in sizes if name != "threads"}
    args.out.mkdir(parents=True, exist_ok=True)
    runs = train_missing(args.out / "runs.jsonl", settings | {"data": text.name}, text, args)
    lines, best = report(runs, args)
    what = f"{text.name}; {best[args.methods[0]][0]['parameters']:,} parameters; torch {torch.__version__}\n"
    what += ", ".join(f"{name} {value}" for name, value in settings.items()) + f"; seeds {args.seeds}"
    command = shlex.join(["python", "examples/char_lm.py", *(sys.argv[1:] if argv is None else argv)])
    print(f"{lines}\n\n{what}")
    (args.out / "table.md").write_text(f"{lines}\n\n{what}\n\n    {command}\n", encoding="utf-8")
    try:
        draw(best, what, args.out / "curves.png")
    except ModuleNotFoundError as error:
        print(f"No picture: {error.name!r} is missing.")


if __name__ == "__main__":
    main()
