# SPDX-License-Identifier: Apache-2.0
"""The networks for degraded images: what the parameter does in them, and that like is compared with like."""

import base64

import pytest
import torch

from csgd_cuda import CSGD
from experiments.data import ImageSet, Split
from experiments.degraded import models
from experiments.degraded.mixture import KINDS, Mixture, Worst
from experiments.degraded.probe import LinearProbe
from experiments.degraded.task import REGIMES, SHOWN, Degraded, DegradedOptions
from experiments.loop import Training
from experiments.methods import Method
from experiments.schedule import Schedule
from experiments.settings import Execution, Recipe, Run

from ..helpers import assert_same_bits

OPTIONS = DegradedOptions("rows", mixture=Mixture(KINDS, "one", Worst()), levels=2, width=4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images():
    """Noisy images with a bright row, its number the label: 96 to train on, 40 to test."""

    def split(count, seed):
        labels = torch.arange(count) % 4
        pixels = torch.randint(0, 60, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
        pixels[torch.arange(count), 0, 2 * labels] += 180
        return Split(pixels.to(torch.uint8), labels)

    return ImageSet("rows", train=split(96, 0), test=split(40, 1), classes=4, flips=False)


def make_training(images, injection="film", method="csgd", seed=0, epochs=2):
    recipe = Recipe(epochs, 16, Schedule("cosine", epochs), 0.9, 0.0, False)
    run = Run(
        "degraded", OPTIONS, injection, recipe, Execution(), Method(method, 1.0 if method == "csgd" else None), 0.05,
        seed, {},
    )  # fmt: skip
    return Training(run, Degraded(images, OPTIONS))


def trained(training):
    while len(training.rows) < training.run.recipe.epochs:
        training.train_epoch(lambda: None)
    return training


def conditions_of(training):
    training.finish()
    return training.results["conditions"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("injection", models.INJECTIONS)
def test_parameter_changes_the_output_of_its_own_image_only(injection, channels):
    torch.manual_seed(0)
    network = models.INJECTIONS[injection](5, 4, channels, 3).eval()
    if injection.startswith("film"):  # starts as no modulation at all
        torch.nn.init.normal_(network.modulation.layers[2].weight, generator=torch.Generator().manual_seed(0))
    inputs = torch.rand(6, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    vectors = torch.rand(6, 3, generator=torch.Generator().manual_seed(2))
    before = network(inputs, vectors)
    assert before.shape == (6, 5)
    for element in range(3):
        other = vectors.clone()
        other[2, element] += 0.5
        changed = (network(inputs, other) - before).abs().amax(dim=1)
        assert changed[2] > 1e-4
        assert changed[[0, 1, 3, 4, 5]].max() < 1e-6


@pytest.mark.parametrize("injection", models.INJECTIONS)
def test_training_makes_use_of_the_parameter(injection):
    """Where the class is in the vector alone, the classifier must find it there."""
    torch.manual_seed(0)
    network = models.INJECTIONS[injection](2, 4, 1, 1)
    optimizer = CSGD(network.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        labels = torch.randint(0, 2, (32,), generator=generator)
        inputs = torch.randn(32, 1, 8, 8, generator=generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(inputs, labels[:, None].float()), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # guessing: 0.69


@pytest.mark.parametrize("injection", models.INJECTIONS)
def test_known_and_absent_are_equal_in_size_and_start(images, injection):
    training = make_training(images, injection)
    states = (training.model[name].state_dict() for name in ("known", "absent"))
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert_same_bits(a, b)
    assert all(isinstance(optimizer, CSGD) for optimizer in training.optimizers)
    assert {type(o) for o in make_training(images, injection, "sgd").optimizers} == {torch.optim.SGD}


def test_each_network_is_trained_as_if_it_were_alone(images):
    """Its optimizer draws as it would for this network only, from gradients of its own loss."""
    together = trained(make_training(images))
    task = together.task
    alone = task.build_model("film", 0)["estimator"]
    optimizer = CSGD(alone.parameters(), lr=0.05, momentum=0.9, calibration=1.0, seed=0)
    for epoch in range(2):
        alone.train()
        for i, (inputs, (vectors, _)) in enumerate(task.batches(0, epoch, 16)):
            optimizer.param_groups[0]["lr"] = 0.05 * together.run.recipe.schedule.factor(6 * epoch + i, 6)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(alone(inputs), vectors).backward()
            optimizer.step()
    for a, b in zip(alone.parameters(), together.model["estimator"].parameters(), strict=True):
        assert_same_bits(a, b)


def test_absent_never_sees_the_parameter(images):
    seen = {"known": [], "absent": []}
    training = make_training(images)
    for name, vectors in seen.items():
        training.model[name].register_forward_hook(lambda _, args, __, v=vectors: v.append(args[1].clone()))
    training.train_epoch(lambda: None)
    assert len(seen["known"]) == len(seen["absent"]) == 6
    assert all((vectors == 0.5).all() for vectors in seen["absent"])
    assert all(len(vectors.unique(dim=0)) > 10 for vectors in seen["known"])


def test_a_training_is_a_function_of_its_seed(images):
    first, again, other = (trained(make_training(images, seed=seed)) for seed in (3, 3, 4))
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert_same_bits(a, b)
    assert conditions_of(first) == conditions_of(again)
    assert [row["train_known_loss"] for row in first.rows] != [row["train_known_loss"] for row in other.rows]


def test_regimes_are_what_they_are_called(images):
    """Accuracies by hand, from networks and vectors."""
    training = trained(make_training(images, epochs=6))
    task = training.task
    known, absent, estimator = (training.model[name] for name in ("known", "absent", "estimator"))
    with torch.no_grad():  # wrong estimates, and a network that listens to them
        estimator.cnn.head.bias += 0.7
        known.modulation.layers[2].weight *= 5
        absent.head.bias[1] += 20
    results = conditions_of(training)
    assert [result["text"] for result in results] == [condition.text for condition in task.mixture.conditions(2)]
    clean = results[0]
    inputs = (images.test.images.float() - task.mean) / task.std
    truth, constant = torch.zeros(40, 3), torch.full((40, 3), 0.5)
    with torch.no_grad():
        estimates = estimator(inputs)
        logits = known(inputs, truth), known(inputs, estimates), absent(inputs, constant), known(inputs, constant)
    for regime, found in zip((*REGIMES, "withheld"), logits, strict=True):
        classes = found.argmax(dim=1)
        assert clean["accuracy"][regime] == int((classes == images.test.labels).sum()) / 40, regime
        if regime != "withheld":
            assert clean["shown"][regime] == classes[:SHOWN].tolist()
    assert base64.b64decode(clean["pictures"]["pixels"]) == images.test.images[:SHOWN].numpy().tobytes()
    assert clean["estimation_error"] == pytest.approx(estimates.abs().mean(dim=0).tolist(), abs=1e-6)
    assert 0 <= estimates.min() <= estimates.max() <= 1
    assert min(error for result in results for error in result["estimation_error"]) >= 0
    assert len({tuple(found.argmax(dim=1).tolist()) for found in logits}) == 4


def test_withholding_the_parameter_shows_whether_it_is_used(images):
    """A classifier whose modulation is switched off gives the same with and without its parameter."""
    training = trained(make_training(images))
    assert any(r["accuracy"]["known"] != r["accuracy"]["withheld"] for r in conditions_of(training))
    torch.nn.init.zeros_(training.model["known"].modulation.layers[2].weight)
    assert all(r["accuracy"]["known"] == r["accuracy"]["withheld"] for r in conditions_of(training))


def test_linear_probe_finds_what_is_linear_and_no_more():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(300, 4, generator=generator)
    features[:, 3] = features[:, 0]  # dependent, as features of a trained network may be
    told = 0.2 + 0.5 * features[:, :1] + 0.2 * features[:, 1:2]
    untold = torch.rand(300, 1, generator=generator)
    probe = LinearProbe(features[:200], torch.cat([told, untold], dim=1)[:200])
    error = (probe(features[200:]) - torch.cat([told, untold], dim=1)[200:]).abs().mean(dim=0)
    assert error[0] < 1e-6
    assert error[1] > 0.2  # of the mean of a uniform number: 0.25


def test_building_networks_leaves_the_global_random_state_alone(images):
    before = torch.get_rng_state()
    a, b, other = (Degraded(images, OPTIONS).build_model("film", seed)["estimator"] for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert_same_bits(a.cnn.conv1.weight, b.cnn.conv1.weight)
    assert not torch.equal(a.cnn.conv1.weight, other.cnn.conv1.weight)
