# SPDX-License-Identifier: Apache-2.0
"""Three networks trained on the same degraded images, and the accuracies of the three regimes.

``known`` is a classifier that gets the true parameter vectors, ``absent`` the same classifier that gets the same
constant vector for every image, ``estimator`` predicts the vector. The regimes are these: the parameter is known; it
is estimated (the known classifier with the vectors of the estimator); it is absent.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import data
from experiments.data import ImageSet, Split
from experiments.methods import Together
from experiments.seeding import order, seeded
from experiments.task import DataOptions, Task
from tools.program import UserError

from . import models
from .data import DegradedImages, Draws, batches, stretched
from .mixture import Condition, Mixture
from .probe import LinearProbe

REGIMES = ("known", "estimated", "absent")
ABSENT = 0.5  # each element of the vector that stands for "absent": the middle of what there is
SHOWN = 8  # test images whose predictions are kept for the picture
_TEST_BATCH = 500  # images
_PROBED = 2000  # training images that the linear probe is fitted on
TEST_SEED = 0  # the test images of every training are degraded alike


@dataclass(frozen=True)
class DegradedOptions(DataOptions):
    """mixture: how images are degraded; levels: strengths tested, up to 1; width: first channels of each network;
    test_limit: use the first ``test_limit`` test images only, None for all; calibration: c of CSGD, one for all
    trainings of a report."""

    mixture: Mixture | None = None
    levels: int = 4
    width: int = 16
    test_limit: int | None = None
    calibration: float = 1.0


class Degraded(Task):
    """Classification of images that are degraded anew in each epoch; all is measured after the last one.

    The model is Together of the three networks. Targets: (parameter vectors [B, P], labels int64 [B]).
    """

    metrics = ()
    splits = ()

    def __init__(self, images: ImageSet, options: DegradedOptions):
        """``images``: its brightest grey level should be 255, which the sigmas of the noise refer to."""
        self.images, self.mixture, self._options = images, options.mixture, options
        self.mean, self.std = images.mean_and_std()

    @classmethod
    def create(cls, options: DegradedOptions) -> Degraded:
        """On one of data.READERS."""
        return cls(read_images(options), options)

    def about(self) -> dict[str, Any]:
        """Numbers and size of the images."""
        return {
            "images": {"train": len(self.images.train), "test": len(self.images.test)},
            "image_size": list(self.images.train.images.shape[1:]),
            "checksum": self.images.checksum(),
        }

    def build_model(self, name: str, seed: int) -> Together:
        """``name``: of models.INJECTIONS. known and absent start from the same weights."""
        shape = self._options.width, self.images.train.images.shape[1], len(self.mixture.kinds)
        networks = {}
        for network in ("known", "absent", "estimator"):
            with seeded(seed):
                if network == "estimator":
                    networks[network] = models.Estimator(*shape)
                else:
                    networks[network] = models.INJECTIONS[name](self.images.classes, *shape)
        return Together(networks)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Task:
        """Moves mean and standard deviation, too; images are degraded on the CPU."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device, dtype, channels_last)

    def batches(self, seed: int, epoch: int, batch_size: int) -> _Batches:
        """In a new order each epoch, degraded anew."""
        return self._batches(self.images.train, Draws("train", seed, epoch), None, seed, epoch, batch_size)

    def _batches(self, split: Split, draws: Draws, condition: Condition | None, *how: int) -> _Batches:
        """how: seed and epoch of the order, and the size of a batch; without them the images in their order."""
        degraded = DegradedImages(split, self.mixture, draws, condition)
        positions = order(len(split), *how[:2]) if how else torch.arange(len(split))
        return _Batches(self, batches(degraded, positions, how[2] if how else _TEST_BATCH, self._options.loaders))

    def loss(self, model: Together, inputs: Tensor, targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the classifiers in nats per image, mean squared error of the estimator."""
        vectors, labels = targets
        constant = torch.full_like(vectors, ABSENT)
        return {
            "known": F.cross_entropy(model["known"](inputs, vectors).float(), labels),
            "absent": F.cross_entropy(model["absent"](inputs, constant).float(), labels),
            "estimator": F.mse_loss(model["estimator"](inputs).float(), vectors.float()),
        }

    def evaluate(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Nothing; final() measures."""
        return {}

    @torch.no_grad()
    def final(self, model: Together, name: str, seed: int) -> dict[str, Any]:
        """parameters: numbers of weights; conditions: for each of the mixture's conditions the condition, accuracy (0
        to 1) per regime, mean error per estimate.

        "withheld" is the accuracy of the known classifier with the vector of absent: what it makes of the parameter.
        "estimation_error" is the mean of |estimate - truth| for each element of the vector, "probe_error" the same for
        what a linear function finds in the features of the network that never saw the vector. "shown" has the
        predictions for the first SHOWN test images per regime, at some strengths with the pictures: their labels and
        their uint8 pixels in base64.
        """
        model.eval()
        probe = self._probe(model, seed)
        conditions = self.mixture.conditions(self._options.levels)
        return {
            "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in model.items()},
            "conditions": [
                asdict(condition) | self._test(model, condition, probe) | self._pictures(condition, conditions)
                for condition in conditions
            ],
        }

    def _pictures(self, condition: Condition, conditions: list[Condition]) -> dict[str, Any]:
        """The first test images as they are degraded: clean, in the middle of the strengths, and at the strongest."""
        strengths = sorted({other.strength for other in conditions} - {0.0})
        if condition.strength not in (0.0, strengths[len(strengths) // 2 - 1], strengths[-1]):
            return {}
        degraded = DegradedImages(self.images.test, self.mixture, Draws("test", TEST_SEED, 0), condition)
        images, _, labels = degraded[list(range(SHOWN))]
        return {
            "pictures": {
                "labels": labels.tolist(),
                "shape": list(images.shape),
                "pixels": base64.b64encode(images.numpy().tobytes()).decode("ascii"),
            }
        }

    def _probe(self, model: Together, seed: int) -> LinearProbe:
        """Of the parameter vector in the features of ``absent``, fitted on freshly degraded training images."""
        split = self.images.train
        chosen = Split(split.images[:_PROBED], split.labels[:_PROBED])
        loader = self._batches(chosen, Draws("probe", seed, 0), None)
        pairs = [(_absent_features(model, images, vectors), vectors) for images, (vectors, _) in loader]
        return LinearProbe(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))

    def _test(self, model: Together, condition: Condition, probe: LinearProbe) -> dict[str, Any]:
        loader = self._batches(self.images.test, Draws("test", TEST_SEED, 0), condition)
        right = dict.fromkeys((*REGIMES, "withheld"), 0)
        errors = torch.zeros(2, len(self.mixture.kinds), dtype=torch.float64)
        shown: dict[str, list[int]] = {}
        for images, (vectors, labels) in loader:
            estimates = model["estimator"](images)
            found = torch.stack([estimates, probe(_absent_features(model, images, vectors))])
            errors += (found - vectors).abs().double().sum(dim=1).cpu()
            for regime, classes in _predictions(model, images, vectors, estimates).items():
                right[regime] += int((classes == labels).sum())
                shown.setdefault(regime, classes[:SHOWN].tolist())
        count = len(self.images.test)
        return {
            "accuracy": {regime: number / count for regime, number in right.items()},
            "estimation_error": (errors[0] / count).tolist(),
            "probe_error": (errors[1] / count).tolist(),
            "shown": {regime: shown[regime] for regime in REGIMES},
        }


class _Batches:
    """(images as cast() takes them, normalised by the clean training images, (vectors, labels)) on the device."""

    def __init__(self, task: Degraded, loader):
        self._task, self._loader = task, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        task = self._task
        for images, vectors, labels in self._loader:
            images, vectors, labels = (tensor.to(task.device) for tensor in (images, vectors, labels))
            yield task.cast((images.float() - task.mean) / task.std), (vectors.to(task.dtype), labels)


def read_images(options: DegradedOptions) -> ImageSet:
    """The data set, its brightest grey level at 255."""
    images = stretched(data.load(options))
    test = Split(images.test.images[: options.test_limit], images.test.labels[: options.test_limit])
    if len(test) < SHOWN:
        raise UserError(f"--data {options.data}: {len(test)} test images; at least {SHOWN} are needed.")
    return replace(images, test=test)


def _absent_features(model: Together, images: Tensor, vectors: Tensor) -> Tensor:
    return model["absent"].features(images, torch.full_like(vectors, ABSENT))


def _predictions(model: Together, images: Tensor, vectors: Tensor, estimates: Tensor) -> dict[str, Tensor]:
    constant = torch.full_like(vectors, ABSENT)
    logits = {
        "known": model["known"](images, vectors),
        "estimated": model["known"](images, estimates),
        "absent": model["absent"](images, constant),
        "withheld": model["known"](images, constant),
    }
    return {regime: values.argmax(dim=1) for regime, values in logits.items()}
