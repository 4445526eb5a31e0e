# SPDX-License-Identifier: Apache-2.0
"""A trial: three networks trained on the same batches, and the accuracies of the three regimes.

``known`` is a classifier that gets the true parameter vectors, ``absent`` the same classifier that gets the same
constant vector for every image, ``estimator`` predicts the vector. The regimes are these: the parameter is known; it
is estimated (the known classifier with the vectors of the estimator); it is absent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train.data import ImageSet
from benchmarks.train.data.seeding import order
from benchmarks.train.loop import set_lr
from benchmarks.train.methods import Method
from benchmarks.train.schedule import Schedule

from . import models
from .data import DegradedImages, Draws, batches
from .mixture import Condition, Mixture
from .probe import LinearProbe

REGIMES = ("known", "estimated", "absent")
ABSENT = 0.5  # each element of the vector that stands for "absent": the middle of what there is
SHOWN = 8  # test images whose predictions are kept for the picture
_TEST_BATCH = 500  # images
_PROBED = 2000  # training images that the linear probe is fitted on
TEST_SEED = 0  # the test images of every trial are degraded alike


@dataclass(frozen=True)
class Recipe:
    """What all trials of a report share; as on the command line."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    calibration: float
    width: int
    levels: int


@dataclass(frozen=True)
class Choice:
    """What the trials of a report differ in."""

    optimizer: str
    injection: str
    seed: int


@dataclass(frozen=True)
class Place:
    """Where, and by how many processes that degrade images; neither is to change the figures beyond rounding."""

    device: torch.device
    loaders: int


class Trial:
    """The three networks of one choice, trained in lockstep.

    epochs: a dict per epoch done: its number from 1, the mean loss of each network, seconds.
    """

    def __init__(self, images: ImageSet, mixture: Mixture, recipe: Recipe, choice: Choice, place: Place):
        self.images, self.mixture, self.recipe, self.choice, self.place = images, mixture, recipe, choice, place
        self.mean, self.std = (tensor.to(place.device) for tensor in images.mean_and_std())
        shape = recipe.width, images.train.images.shape[1], len(mixture.kinds)
        build = models.INJECTIONS[choice.injection]
        # known and absent start from the same weights.
        self.networks: dict[str, nn.Module] = {
            "known": models.seeded(lambda: build(images.classes, *shape), choice.seed),
            "absent": models.seeded(lambda: build(images.classes, *shape), choice.seed),
            "estimator": models.seeded(lambda: models.Estimator(*shape), choice.seed),
        }
        method = Method(choice.optimizer, None if choice.optimizer == "sgd" else recipe.calibration)
        options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        self.optimizers = {}
        for name, network in self.networks.items():
            network.to(place.device)
            self.optimizers[name] = method.optimizer(network, recipe.lr, choice.seed, **options)
        self.schedule = Schedule("cosine", recipe.epochs)
        self.epochs: list[dict[str, float]] = []

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return -(-len(self.images.train) // self.recipe.batch_size) * self.recipe.epochs

    @property
    def parameters(self) -> dict[str, int]:
        """Number of trained numbers of each network."""
        return {name: models.count_parameters(network) for name, network in self.networks.items()}

    def train_epoch(self, after_step: Callable[[], object]) -> None:
        """Train each network on the same batches, and append the mean losses."""
        epoch, seed, start = len(self.epochs), self.choice.seed, time.perf_counter()
        degraded = DegradedImages(self.images.train, self.mixture, Draws("train", seed, epoch))
        loader = batches(degraded, order(len(degraded), seed, epoch), self.recipe.batch_size, self.place.loaders)
        # float64 lest the sum over an epoch rounds away what a batch adds
        sums = dict.fromkeys(self.networks, torch.zeros((), dtype=torch.float64, device=self.place.device))
        for network in self.networks.values():
            network.train()
        for i, (images, vectors, labels) in enumerate(self._on_device(loader)):
            factor = self.schedule.factor(epoch * len(loader) + i, len(loader))
            for name, loss in self._losses(images, vectors, labels).items():
                optimizer = self.optimizers[name]
                set_lr(optimizer, self.recipe.lr * factor)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sums[name] = sums[name] + loss.detach() * len(labels)
            after_step()
        losses = {f"{name}_loss": total.item() / len(degraded) for name, total in sums.items()}
        self.epochs.append({"epoch": epoch + 1, **losses, "seconds": time.perf_counter() - start})

    def _losses(self, images: Tensor, vectors: Tensor, labels: Tensor) -> dict[str, Tensor]:
        known, absent, estimator = (self.networks[name] for name in ("known", "absent", "estimator"))
        return {
            "known": F.cross_entropy(known(images, vectors), labels),
            "absent": F.cross_entropy(absent(images, torch.full_like(vectors, ABSENT)), labels),
            "estimator": F.mse_loss(estimator(images), vectors),
        }

    @torch.no_grad()
    def _probe(self) -> LinearProbe:
        """Of the parameter vector in the features of ``absent``, fitted on freshly degraded training images."""
        degraded = DegradedImages(self.images.train, self.mixture, Draws("probe", self.choice.seed, 0))
        chosen = torch.arange(min(len(degraded), _PROBED))
        loader = batches(degraded, chosen, _TEST_BATCH, self.place.loaders)
        pairs = [(self._absent_features(images, vectors), vectors) for images, vectors, _ in self._on_device(loader)]
        return LinearProbe(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))

    def _absent_features(self, images: Tensor, vectors: Tensor) -> Tensor:
        return self.networks["absent"].features(images, torch.full_like(vectors, ABSENT))

    @torch.no_grad()
    def evaluate(self, after_condition: Callable[[], object]) -> list[dict[str, Any]]:
        """For each of the mixture's conditions: the condition, accuracy (0 to 1) per regime, mean error per estimate.

        "withheld" is the accuracy of the known classifier with the vector of absent: what it makes of the parameter.
        "estimation_error" is the mean of |estimate - truth| for each element of the vector, "probe_error" the same for
        what a linear function finds in the features of the network that never saw the vector. "shown" has the
        predictions for the first SHOWN test images per regime.
        """
        for network in self.networks.values():
            network.eval()
        probe, results = self._probe(), []
        for condition in self.mixture.conditions(self.recipe.levels):
            results.append(asdict(condition) | self._test(condition, probe))
            after_condition()
        return results

    def _test(self, condition: Condition, probe: LinearProbe) -> dict[str, Any]:
        degraded = DegradedImages(self.images.test, self.mixture, Draws("test", TEST_SEED, 0), condition)
        loader = batches(degraded, torch.arange(len(degraded)), _TEST_BATCH, self.place.loaders)
        right = dict.fromkeys((*REGIMES, "withheld"), 0)
        errors = torch.zeros(2, len(self.mixture.kinds), dtype=torch.float64)
        shown: dict[str, list[int]] = {}
        for images, vectors, labels in self._on_device(loader):
            estimates = self.networks["estimator"](images)
            found = torch.stack([estimates, probe(self._absent_features(images, vectors))])
            errors += (found - vectors).abs().double().sum(dim=1).cpu()
            for regime, classes in self._predictions(images, vectors, estimates).items():
                right[regime] += int((classes == labels).sum())
                shown.setdefault(regime, classes[:SHOWN].tolist())
        return {
            "accuracy": {regime: count / len(degraded) for regime, count in right.items()},
            "estimation_error": (errors[0] / len(degraded)).tolist(),
            "probe_error": (errors[1] / len(degraded)).tolist(),
            "shown": {regime: shown[regime] for regime in REGIMES},
        }

    def _predictions(self, images: Tensor, vectors: Tensor, estimates: Tensor) -> dict[str, Tensor]:
        known, absent = self.networks["known"], self.networks["absent"]
        constant = torch.full_like(vectors, ABSENT)
        logits = {
            "known": known(images, vectors),
            "estimated": known(images, estimates),
            "absent": absent(images, constant),
            "withheld": known(images, constant),
        }
        return {regime: values.argmax(dim=1) for regime, values in logits.items()}

    def _on_device(self, loader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches with the images normalised by mean and standard deviation of the clean training images."""
        for images, vectors, labels in loader:
            images, vectors, labels = (tensor.to(self.place.device) for tensor in (images, vectors, labels))
            yield (images.float() - self.mean) / self.std, vectors, labels
