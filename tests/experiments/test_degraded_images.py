# SPDX-License-Identifier: Apache-2.0
"""The degradations are what they say, and a function of seed, epoch and image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data import ImageSet, Split
from experiments.degraded import degrade
from experiments.degraded.data import DegradedImages, Draws, batches, stretched
from experiments.degraded.mixture import KINDS, Mixture, Worst

SEED = 5


@pytest.fixture
def photo():
    """Smooth shapes with some texture, uint8 [3, 40, 56]: sides that are and are not multiples of 8."""
    y, x = np.mgrid[:40, :56]
    generator = np.random.default_rng(SEED)
    planes = [120 + 60 * np.sin(x / 5 + c) * np.cos(y / (6 + c)) + 12 * generator.random((40, 56)) for c in range(3)]
    return np.stack(planes).astype(np.uint8)


def decoded(image, quality):
    """Through a file of bytes, with Pillow alone; uint8 [C, H, W] and the number of bytes."""
    file = io.BytesIO()
    picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2).copy())
    picture.save(file, "JPEG", quality=quality)
    pixels = np.asarray(Image.open(file))
    return (pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)), len(file.getvalue())


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_codec_for_grey_and_colour(photo, channels):
    image = photo[:channels]
    errors, sizes = [], []
    for quality in (95, 50, 10, 1):
        expected, size = decoded(image, quality)
        found = degrade.jpeg(image, quality)
        assert found.dtype == np.uint8
        assert found.shape == image.shape
        assert np.array_equal(found, expected)
        errors.append(np.abs(found.astype(int) - image).mean())
        sizes.append(size)
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


def test_jpeg_leaves_blocks_of_8_pixels(photo):
    """At the lowest quality what varies within a block goes; the steps lie between the blocks."""
    image = degrade.jpeg(photo[:1], 1)[0].astype(int)
    steps = np.abs(np.diff(image, axis=1)).mean(axis=0)  # between the columns i and i + 1
    between = np.arange(len(steps)) % 8 == 7
    assert steps[between].mean() > 5 * steps[~between].mean()


def test_noise_has_the_sigma_asked_for():
    image = np.full((3, 128, 128), 128, np.uint8)
    for sigma in (0.0, 4.0, 25.0):
        added = degrade.noise(image, sigma, np.random.default_rng(SEED)).astype(float) - 128
        # Rounding adds a variance of 1/12. The deviation of 49152 values is known to 0.3 %; four of these.
        assert added.std() == pytest.approx((sigma**2 + (1 / 12 if sigma else 0)) ** 0.5, rel=0.013), sigma
        assert abs(added.mean()) <= 4 * sigma / 49152**0.5
        correlation = (added[:, :, 1:] * added[:, :, :-1]).mean() / max(sigma**2, 1)
        assert abs(correlation) < 4 / 48768**0.5


def test_noise_is_clipped_to_grey_levels():
    dark = degrade.noise(np.zeros((1, 64, 64), np.uint8), 50.0, np.random.default_rng(SEED))
    assert 0.4 < (dark == 0).mean() < 0.6  # not wrapped to 255
    assert dark.max() < 255


def dense_blur(image, sigma):
    """The definition, a sum over all offsets for each pixel, with the nearest pixel beyond the edges; float64."""
    radius = int(np.ceil(4 * sigma))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    height, width = image.shape[1:]
    result = np.zeros(image.shape)
    for i, dy in enumerate(offsets):
        for j, dx in enumerate(offsets):
            rows, columns = np.clip(np.arange(height) + dy, 0, height - 1), np.clip(np.arange(width) + dx, 0, width - 1)
            result += weights[i, j] * image[:, rows][:, :, columns]
    return result


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 2.5])
def test_blur_is_the_convolution_with_a_gaussian(photo, sigma):
    found = degrade.blur(photo, sigma)
    assert found.dtype == np.uint8
    assert np.abs(found - dense_blur(photo, sigma)).max() <= 0.5 + 1e-3  # rounded to nearest
    assert degrade.gaussian(sigma).sum() == pytest.approx(1, abs=1e-6)


def test_blur_of_sigma_0_changes_nothing(photo):
    assert np.array_equal(degrade.blur(photo, 0), photo)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda image: degrade.jpeg(image, 0), "quality must be a whole number from 1 to 95, not 0"),
        (lambda image: degrade.jpeg(image, 96), "quality .* not 96"),
        (lambda image: degrade.jpeg(image, 50.5), "quality .* not 50.5"),
        (lambda image: degrade.jpeg(image[:2], 50), "1 or 3 channels, not 2"),
        (lambda image: degrade.noise(image, -1.0, None), "sigma of the noise must be a number from 0 to 255, not -1"),
        (lambda image: degrade.noise(image, 256.0, None), "sigma of the noise .* not 256"),
        (lambda image: degrade.noise(image, float("nan"), None), "sigma of the noise .* not nan"),
        (lambda image: degrade.blur(image, -0.5), "sigma of the blur must be a number from 0 to 10, not -0.5"),
        (lambda image: degrade.blur(image, float("inf")), "sigma of the blur .* not inf"),
        (lambda _: Worst(quality=96), "quality .* not 96"),
        (lambda _: Worst(noise=300), "sigma of the noise .* not 300"),
        (lambda _: Worst(blur=11), "sigma of the blur .* not 11"),
    ],
)
def test_what_is_out_of_range_is_refused(photo, call, words):
    before = photo.copy()
    with pytest.raises(ValueError, match=words):
        call(photo)
    assert np.array_equal(photo, before)


def test_parameter_vector_says_what_was_done(photo):
    """An image degraded by hand, as the vector says, is the image that the mixture gives."""
    mixture = Mixture(KINDS, "chain", Worst(quality=6, noise=40.0, blur=2.0))
    vector = np.array([0.5, 0.25, 0.75], np.float32)
    found = mixture.apply(photo, vector, np.random.default_rng(SEED))
    by_hand = degrade.noise(degrade.blur(photo, 1.5), 10.0, np.random.default_rng(SEED))
    assert np.array_equal(found, degrade.jpeg(by_hand, 51))
    assert np.array_equal(mixture.apply(photo, np.zeros(3), np.random.default_rng(SEED)), photo)


@pytest.mark.parametrize("how", ["one", "chain"])
def test_drawn_vectors_are_normalised_and_of_the_mixture(how):
    mixture = Mixture(KINDS, how, Worst(quality=5))
    draws = np.random.default_rng(SEED)
    vectors = np.stack([mixture.draw(draws) for _ in range(600)])
    assert vectors.dtype == np.float32
    assert 0 <= vectors.min() <= vectors.max() <= 1
    applied = (vectors > 0).sum(axis=1)
    assert applied.max() == (1 if how == "one" else 3)
    for i in range(3):
        positive = vectors[vectors[:, i] > 0, i]
        assert len(positive) > (150 if how == "one" else 550)
        assert positive.mean() == pytest.approx(0.5, abs=0.1)
    steps = vectors[:, 0] * (96 - 5)  # qualities are whole numbers
    assert np.allclose(steps, steps.round(), atol=1e-4)


def test_conditions_go_from_clean_to_the_worst():
    mixture = Mixture(("jpeg", "blur"), "one", Worst(quality=4, blur=3.0))
    conditions = mixture.conditions(2)
    assert [c.text for c in conditions] == [
        "clean", "JPEG quality 50", "JPEG quality 4", "blur sigma 1.5", "blur sigma 3",
    ]  # fmt: skip
    assert [c.vector for c in conditions] == [(0, 0), (0.5, 0), (1, 0), (0, 0.5), (0, 1)]
    (clean, chain) = Mixture(("jpeg", "blur"), "chain", Worst(quality=4, blur=3.0)).conditions(1)
    assert clean.vector == (0, 0)
    assert (chain.kind, chain.text, chain.vector) == ("chain", "JPEG quality 4, blur sigma 3", (1, 1))


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(SEED)
    return Split(torch.randint(0, 256, (24, 1, 9, 11), generator=generator).to(torch.uint8), torch.arange(24) % 3)


def by_position(split, order, seed=1, epoch=2, loaders=0):
    """Position -> (bytes of the degraded image, its vector, its label)."""
    images = DegradedImages(split, Mixture(KINDS, "chain", Worst()), Draws("train", seed, epoch))
    found = {}
    for positions, batch in zip(order.split(5), batches(images, order, 5, loaders), strict=True):
        for position, image, vector, label in zip(positions.tolist(), *batch, strict=True):
            found[position] = image.numpy().tobytes(), tuple(vector.tolist()), label.item()
    return found


def test_same_seed_and_epoch_give_the_same_images_in_any_order(split):
    forwards = by_position(split, torch.arange(24))
    assert len(forwards) == 24
    assert [label for _, _, label in forwards.values()] == split.labels.tolist()
    assert by_position(split, torch.arange(24).flip(0)) == forwards
    few = torch.tensor([7, 20, 3])
    assert by_position(split, few) == {i: forwards[i] for i in few.tolist()}


def test_other_seeds_epochs_and_images_give_other_draws(split):
    same = Split(split.images[:1].expand(24, -1, -1, -1), split.labels)
    seen = [by_position(same, torch.arange(24), seed, epoch) for seed, epoch in ((1, 2), (2, 1), (1, 3))]
    assert len({image for found in seen for image, _, _ in found.values()}) == 3 * 24


def test_number_of_processes_does_not_change_the_images(split):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(SEED))
    assert by_position(split, order, loaders=2) == by_position(split, order)


def test_global_random_state_is_left_alone(split):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    by_position(split, torch.arange(24))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_brightest_training_level_becomes_255():
    train = Split(torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.arange(3))
    test = Split(torch.tensor([8, 20], dtype=torch.uint8).reshape(2, 1, 1, 1), torch.arange(2))
    images = stretched(ImageSet("levels", train=train, test=test, classes=3, flips=False))
    assert images.train.images.flatten().tolist() == [0, 64, 255]
    assert images.test.images.flatten().tolist() == [128, 255]
