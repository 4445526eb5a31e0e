# SPDX-License-Identifier: Apache-2.0
"""The networks of ``examples.degraded``: what the parameter does in them, and that a trial compares like with like."""

from dataclasses import replace

import pytest
import torch

from benchmarks.train.data import ImageSet, Split
from csgd_cuda import CSGD
from examples.degraded import models
from examples.degraded.mixture import KINDS, Mixture, Worst
from examples.degraded.probe import LinearProbe
from examples.degraded.trial import REGIMES, SHOWN, Choice, Place, Recipe, Trial

from ..helpers import assert_same_bits

RECIPE = Recipe(
    epochs=2, batch_size=16, lr=0.05, momentum=0.9, weight_decay=0.0, calibration=1.0, width=4, levels=2
)  # fmt: skip
CPU = Place(torch.device("cpu"), 0)


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


def make_trial(images, injection="film", optimizer="csgd", seed=0, **recipe):
    return Trial(
        images, Mixture(KINDS, "one", Worst()), replace(RECIPE, **recipe), Choice(optimizer, injection, seed), CPU
    )


def trained(trial):
    while len(trial.epochs) < trial.recipe.epochs:
        trial.train_epoch(lambda: None)
    return trial


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("injection", models.INJECTIONS)
def test_parameter_changes_the_output_of_its_own_image_only(injection, channels):
    network = models.seeded(lambda: models.INJECTIONS[injection](5, 4, channels, 3), 0).eval()
    if injection == "film":  # starts as no modulation at all
        torch.nn.init.normal_(network.modulation[2].weight, generator=torch.Generator().manual_seed(0))
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
    network = models.seeded(lambda: models.INJECTIONS[injection](2, 4, 1, 1), 0)
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
    trial = make_trial(images, injection)
    assert trial.parameters["known"] == trial.parameters["absent"]
    assert trial.parameters["known"] == sum(p.numel() for p in trial.networks["known"].parameters())
    for a, b in zip(*(trial.networks[name].state_dict().values() for name in ("known", "absent")), strict=True):
        assert_same_bits(a, b)
    assert all(isinstance(optimizer, CSGD) for optimizer in trial.optimizers.values())
    assert {type(o) for o in make_trial(images, injection, "sgd").optimizers.values()} == {torch.optim.SGD}


def test_absent_never_sees_the_parameter(images, monkeypatch):
    seen = {"known": [], "absent": []}
    trial = make_trial(images)
    for name, vectors in seen.items():
        trial.networks[name].register_forward_hook(lambda _, args, __, v=vectors: v.append(args[1].clone()))
    trial.train_epoch(lambda: None)
    assert len(seen["known"]) == len(seen["absent"]) == 6
    assert all((vectors == 0.5).all() for vectors in seen["absent"])
    assert all(len(vectors.unique(dim=0)) > 10 for vectors in seen["known"])


def test_a_trial_is_a_function_of_its_seed(images):
    first, again, other = (trained(make_trial(images, seed=seed)) for seed in (3, 3, 4))
    for name, network in first.networks.items():
        for a, b in zip(network.parameters(), again.networks[name].parameters(), strict=True):
            assert_same_bits(a, b)
    assert first.evaluate(lambda: None) == again.evaluate(lambda: None)
    assert [row["known_loss"] for row in first.epochs] != [row["known_loss"] for row in other.epochs]


def test_the_learning_rate_falls_along_a_cosine(images):
    trial, seen = make_trial(images), []
    step = trial.optimizers["known"].step
    trial.optimizers["known"].step = lambda: (seen.append(trial.optimizers["known"].param_groups[0]["lr"]), step())
    trained(trial)
    assert len(seen) == trial.steps == 12
    assert seen[0] == 0.05
    assert seen[6] == pytest.approx(0.025)
    assert seen == sorted(seen, reverse=True)


def test_regimes_are_what_they_are_called(images):
    """Accuracies by hand, from networks and vectors."""
    trial = trained(make_trial(images, epochs=6))
    known, absent, estimator = (trial.networks[name] for name in ("known", "absent", "estimator"))
    with torch.no_grad():  # wrong estimates, and a network that listens to them
        estimator.cnn.head.bias += 0.7
        known.modulation[2].weight *= 5
        absent.head.bias[1] += 20
    conditions, results = trial.mixture.conditions(2), trial.evaluate(lambda: None)
    assert [result["text"] for result in results] == [condition.text for condition in conditions]
    clean = results[0]
    inputs = (images.test.images.float() - trial.mean) / trial.std
    truth, constant = torch.zeros(40, 3), torch.full((40, 3), 0.5)
    with torch.no_grad():
        estimates = estimator(inputs)
        logits = known(inputs, truth), known(inputs, estimates), absent(inputs, constant), known(inputs, constant)
    for regime, found in zip((*REGIMES, "withheld"), logits, strict=True):
        classes = found.argmax(dim=1)
        assert clean["accuracy"][regime] == int((classes == images.test.labels).sum()) / 40, regime
        if regime != "withheld":
            assert clean["shown"][regime] == classes[:SHOWN].tolist()
    assert clean["estimation_error"] == pytest.approx(estimates.abs().mean(dim=0).tolist(), abs=1e-6)
    assert 0 <= estimates.min() <= estimates.max() <= 1
    assert min(error for result in results for error in result["estimation_error"]) >= 0
    assert len({tuple(found.argmax(dim=1).tolist()) for found in logits}) == 4


def test_withholding_the_parameter_shows_whether_it_is_used(images):
    """A classifier whose modulation is switched off gives the same with and without its parameter."""
    trial = trained(make_trial(images))
    results = trial.evaluate(lambda: None)
    assert any(r["accuracy"]["known"] != r["accuracy"]["withheld"] for r in results)
    torch.nn.init.zeros_(trial.networks["known"].modulation[2].weight)
    assert all(r["accuracy"]["known"] == r["accuracy"]["withheld"] for r in trial.evaluate(lambda: None))


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


def test_building_networks_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    a, b = (models.seeded(lambda: models.Estimator(4, 1, 3), seed) for seed in (0, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert_same_bits(a.cnn.conv1.weight, b.cnn.conv1.weight)
    assert not torch.equal(a.cnn.conv1.weight, models.seeded(lambda: models.Estimator(4, 1, 3), 1).cnn.conv1.weight)
