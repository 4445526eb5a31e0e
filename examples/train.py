# SPDX-License-Identifier: Apache-2.0
"""Train a small CNN with Calibrated SGD and, for comparison, with torch.optim.SGD at the same settings.

    python examples/train.py                              # handwritten digits of scikit-learn, 3 seeds
    python examples/train.py --data DIR                   # MNIST, Fashion-MNIST or another IDX data set
    python examples/train.py --epochs 2 --save run.pt     # stop after 2 epochs ...
    python examples/train.py --epochs 4 --resume run.pt   # ... and go on to 4: the same bits as 4 at once

Both optimizers start from the same weights and see the same batches in the same order; the learning rate
falls every --lr-step epochs, whatever --epochs is. Writes curves.png, table.md, curves.csv and curves.json into --out
and prints the table.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from training import checkpoint, data, device, figure, loop, model, report
from training.errors import UserError, exit_status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def _number(kind: type, low: float) -> Callable[[str], float]:
    """argparse type: a finite number of the kind that is at least ``low``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= low):
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} of at least {low:g}")
        return value

    return parse


def _optimizers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(report.LABEL) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not csgd, sgd or both with a comma between")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", metavar="DIR", help="IDX data set (default: the digits of scikit-learn)")
    p.add_argument("--limit", metavar="N", type=_number(int, 1), help="use the first N training images only")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    p.add_argument(
        "--threads",
        type=_number(int, 1),
        default=1,
        metavar="N",
        help="threads of torch on the CPU. More of them gain little for a small network, and on a busy machine they "
        "mostly wait for each other. Results depend on the number only as far as torch's own arithmetic does; CSGD's "
        "step has the same bits with any (default: %(default)s)",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of parameters, gradients and momentum; no float32 copies (default: %(default)s)",
    )
    p.add_argument(
        "--epochs",
        type=_number(int, 1),
        help="in all, those of a resumed checkpoint included (default: 15, with --data 5)",
    )
    p.add_argument("--seeds", type=_number(int, 1), help="number of trainings (default: 3, with --data 1)")
    p.add_argument(
        "--optimizers",
        type=_optimizers,
        default=("csgd", "sgd"),
        metavar="LIST",
        help="csgd, sgd or csgd,sgd (default: csgd,sgd)",
    )
    _training_options(p)
    p.add_argument("--out", metavar="DIR", default="out/train", help="for the results (default: %(default)s)")
    p.add_argument("--save", metavar="FILE", help="write a checkpoint after every epoch")
    p.add_argument("--resume", metavar="FILE", help="go on from a checkpoint made with the same settings")
    return p


def _training_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--batch-size", type=_number(int, 1), default=64, help="default: %(default)s")
    p.add_argument("--width", type=_number(int, 1), default=32, help="first channels (default: %(default)s)")
    p.add_argument("--lr", type=_number(float, 0), default=0.05, help="learning rate (default: %(default)s)")
    p.add_argument(
        "--lr-step",
        type=_number(int, 0),
        default=10,
        metavar="N",
        help="divide the learning rate by 10 after every N epochs; 0: never (default: %(default)s)",
    )
    p.add_argument("--momentum", type=_number(float, 0), default=0.9, help="default: %(default)s")
    p.add_argument("--weight-decay", type=_number(float, 0), default=0.0, help="default: %(default)s")
    p.add_argument(
        "--calibration",
        type=_number(float, 0),
        default=0.25,
        help="strength c of CSGD; 0 is plain SGD (default: %(default)s)",
    )
    p.add_argument(
        "--fused",
        default="auto",
        choices=("auto", "yes", "no"),
        help="CSGD's kernel: if there is one, demanded, or not (torch.optim.SGD: as torch chooses)",
    )


def _device(text: str) -> torch.device:
    chosen = device.choose(text)
    if chosen.type == "cuda":
        # cuBLAS is deterministic only with a workspace of its own; read when its handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return chosen


def _settings(args: argparse.Namespace, dataset: data.Dataset) -> loop.Settings:
    values = {name: value for name, value in vars(args).items() if name in loop.Settings.__dataclass_fields__}
    # By content, not by path: the data may have moved since the checkpoint was written.
    images = f"{len(dataset.train_labels)}+{len(dataset.test_labels)} images"
    values["data"] = f"{images} (checksum {dataset.checksum})"
    return loop.Settings(**values)


def run(args: argparse.Namespace) -> None:
    """Check everything that can be wrong, train, report."""
    chosen = _device(args.device)
    torch.set_num_threads(args.threads)
    if args.save:
        checkpoint.check_target(args.save)
    dataset = data.load(args.data, args.limit)
    args.epochs = args.epochs or (5 if args.data else 15)
    args.seeds = args.seeds or (1 if args.data else 3)
    settings = _settings(args, dataset)
    runs = checkpoint.load(args.resume, settings, args.epochs) if args.resume else {}
    out = report.prepare(args.out)
    network = model.build(dataset.classes, args.width, 0, torch.float32, torch.device("cpu"))
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    print(_announcement(settings, args.epochs, len(dataset.train_labels), sum(sizes.values()), out), flush=True)

    def after_epoch() -> None:
        if args.save:
            checkpoint.save(args.save, settings, runs)

    loop.train_all(settings, dataset.to(chosen), args.epochs, runs, after_epoch)
    after_epoch()  # also when a resume had nothing left to train
    write(report.Results(settings, dataset, sizes, runs), out)


def _announcement(settings: loop.Settings, epochs: int, images: int, parameters: int, out: Path) -> str:
    """What will be run, in one line."""
    optimizers = " and ".join(report.LABEL[name] for name in settings.optimizers)
    steps = math.ceil(images / settings.batch_size)
    return (
        f"Training a CNN with {parameters:,} parameters: {optimizers}, {report.count(settings.seeds, 'seed')}, "
        f"{report.count(epochs, 'epoch')} of {report.count(steps, 'step')}, on {settings.device} with "
        f"{report.count(settings.threads, 'thread')}. Results go to {out}."
    )


def write(results: report.Results, out: Path) -> None:
    """Write the four files and print the table, which is printed even where a file cannot be written."""
    text = report.markdown(results)
    try:
        (out / "table.md").write_text(text, encoding="utf-8")
        (out / "curves.csv").write_text(report.curves_csv(results), encoding="utf-8")
        (out / "curves.json").write_text(report.full_json(results), encoding="utf-8")
        figure.draw(results, out / "curves.png")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); choose another place.") from None
    finally:
        print(text)
    print(f"Written to {out}: curves.png, table.md, curves.csv, curves.json")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    return exit_status(
        "train.py", "--resume goes on from the last epoch that --save wrote.", lambda: run(parser().parse_args(argv))
    )


if __name__ == "__main__":
    sys.exit(main())
