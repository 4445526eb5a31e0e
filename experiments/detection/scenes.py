# SPDX-License-Identifier: Apache-2.0
"""A picture of test scenes of the detection with their boxes, and of what a detector finds in them.

    python -m experiments scenes --data fashion-mnist --data-dir DIR --epochs 6 --out scenes.png

With --epochs a detector is trained first. It leaves no log.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we want: works without a display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from experiments import cli
from experiments.data import CLASS_NAMES
from experiments.grid import Progress, progress_bar, show
from experiments.loop import Training, train
from experiments.methods import Method
from experiments.schedule import Schedule
from experiments.settings import Execution, Recipe, Run
from experiments.task import DataOptions
from tools.program import UserError

from .fcos import Detections
from .task import Detection

ROWS, COLUMNS = 3, 6
SHOWN_SCORE = 0.45  # detections below are not drawn
# Sky blue and orange of the Okabe-Ito palette: told apart with any colour vision; the dashes help in print.
_TRUTH = {"edgecolor": "#56B4E9", "linestyle": "--"}
_FOUND = {"edgecolor": "#E69F00", "linestyle": "-"}
_TEXT = {"fontsize": 7, "clip_on": True, "bbox": {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 0.5}}


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    cli.add_source(p)
    p.add_argument("--model", metavar="NAME", default="fcos", help="detector (%(default)s)")
    p.add_argument("--method", choices=("sgd", "csgd"), default="csgd", help="(%(default)s)")
    p.add_argument(
        "--epochs", type=cli.number(int, 0), default=0, help="train a detector first and draw its boxes, too (0)"
    )
    p.add_argument("--batch-size", type=cli.number(int, 1), default=16, help="(%(default)s)")
    p.add_argument("--lr", type=cli.number(float, 0), default=0.02, help="falls along a cosine (%(default)s)")
    p.add_argument("--seed", type=cli.number(int, 0), default=0, help="(%(default)s)")
    p.add_argument("--out", metavar="FILE", required=True, help="picture to write (png, pdf or svg)")


def run(args: argparse.Namespace, _: list[str]) -> None:
    """Trains where that was wanted, and writes the picture."""
    if not Path(args.out).parent.is_dir():
        raise UserError(f"--out {args.out}: the directory {Path(args.out).parent} does not exist; create it first.")
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: not a picture; give a name that ends in .png, .pdf or .svg.")
    options = DataOptions(args.data, args.data_dir, args.limit)
    task = Detection.create(options)
    task.build_model(args.model, args.seed)  # says now if there is no such network
    draw(task, args.data, _train(args, options, task) if args.epochs else None, args.out)
    print(f"Written to {args.out}")


def _train(args: argparse.Namespace, options: DataOptions, task: Detection) -> Training:
    recipe = Recipe(args.epochs, args.batch_size, Schedule("cosine", args.epochs), 0.9, 0.0, False)
    method = Method(args.method, None if args.method == "sgd" else 1.0)
    what = Run("detection", options, args.model, recipe, Execution(), method, args.lr, args.seed, task.about())
    with progress_bar([what], 1) as bar:
        progress = Progress(lambda report: show(bar, report))
        return train(what, task, progress.step, progress.epoch)


def draw(task: Detection, data: str, training: Training | None, out: str) -> None:
    """The first ROWS * COLUMNS test scenes; UserError where the file cannot be written."""
    scenes = task.scenes("test", ROWS * COLUMNS)
    names = CLASS_NAMES.get(data) or [str(label) for label in range(task.images.classes)]
    found = task.find(training.model, scenes.images) if training else [None] * len(scenes.images)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(3 * COLUMNS, 3 * ROWS + 1.2), layout="constrained")
    for ax, image, boxes, labels, detections in zip(axes.flat, *scenes, found, strict=True):
        _draw_scene(ax, image, boxes[labels >= 0], [names[label] for label in labels if label >= 0], detections, names)
    figure.suptitle(_title(data, training))
    figure.supxlabel("x (pixels)")
    figure.supylabel("y (pixels)")
    handles = [Rectangle((0, 0), 1, 1, fill=False, label="object (class above its box)", **_TRUTH)]
    if training:
        label = f"detection with a score of at least {SHOWN_SCORE:g} (class and score below its box)"
        handles.append(Rectangle((0, 0), 1, 1, fill=False, label=label, **_FOUND))
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); choose another place.") from None
    finally:
        plt.close(figure)


def _title(data: str, training: Training | None) -> str:
    if training is None:
        return f"Test scenes made of {data} images"
    run, last = training.run, training.rows[-1]
    c = "" if run.method.calibration is None else f" (c = {run.method.calibration:g})"
    return (
        f"Test scenes made of {data} images; {run.model} after {len(training.rows)} epochs of {run.method.name}{c}, "
        f"lr {run.lr:g}, seed {run.seed}: mAP {last['test_mAP']:.3f}, mAP50 {last['test_mAP50']:.3f} on all test scenes"
    )


def _draw_scene(
    ax: Axes, image: Tensor, boxes: Tensor, labels: list[str], found: Detections | None, names: list[str]
) -> None:
    ax.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=255, extent=(0, image.shape[1], image.shape[0], 0))
    ax.tick_params(labelsize=7)
    for box, label in zip(boxes.tolist(), labels, strict=True):
        _draw_box(ax, box, _TRUTH)
        ax.text(box[0], box[1], label, color=_TRUTH["edgecolor"], va="bottom", **_TEXT)
    if found is None:
        return
    for box, score, label in zip(*(part.flip(0).tolist() for part in found), strict=True):  # the best on top
        if score >= SHOWN_SCORE:
            _draw_box(ax, box, _FOUND)
            text = f"{names[label]} {score:.2f}"
            ax.text(box[0], box[3], text, color=_FOUND["edgecolor"], va="top", **_TEXT)


def _draw_box(ax: Axes, box: list[float], style: dict[str, str]) -> None:
    x1, y1, x2, y2 = box
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.2, **style))
