# SPDX-License-Identifier: Apache-2.0
"""Data of the experiments: tiny archives as the originals are made, whole and broken, and the augmentation."""

import pickle
import re
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import cli, data
from experiments.cli import Parser
from experiments.data import image_folder
from experiments.data.augment import Augmentation, shift_and_mirror
from experiments.seeding import order
from experiments.task import DataOptions, create
from tools.program import UserError

PIXELS = 3072
FILES = {
    ("cifar10", "python"): ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    ("cifar10", "binary"): ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    ("cifar100", "python"): (["train"], ["test"]),
    ("cifar100", "binary"): (["train.bin"], ["test.bin"]),
}
CASES = list(FILES)


def python2_pickle(images, labels, key):
    """As in the archives: protocol 2, written by Python 2 with numpy 1, all texts byte strings."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85",
            text(b"b") + b"tR(K\x01M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", images.shape[1]),
            b"\x86cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN",
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", images.nbytes) + images.tobytes(),
            b"tb",
        ]
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + numbers + b"u."


def cifar_file(images, labels, name, kind):
    if kind == "python":
        return python2_pickle(images, labels, b"labels" if name == "cifar10" else b"fine_labels")
    before = [labels] if name == "cifar10" else [np.zeros_like(labels), labels]  # the coarse label comes first
    return np.concatenate([np.stack(before, axis=1), images], axis=1).tobytes()


def make_cifar(directory, name, kind, each=3):
    """Files of ``each`` images; the images and labels that went into (training, test)."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    made = []
    for part in FILES[name, kind]:
        images = rng.integers(0, 256, (len(part) * each, PIXELS), dtype=np.uint8)
        labels = rng.integers(0, 10 if name == "cifar10" else 100, len(part) * each, dtype=np.uint8)
        for i, file in enumerate(part):
            chosen = slice(i * each, (i + 1) * each)
            (directory / file).write_bytes(cifar_file(images[chosen], labels[chosen], name, kind))
        made.append((images.reshape(-1, 3, 32, 32), labels))
    return made


def load(name, directory, **options):
    return data.load(DataOptions(name, str(directory), **options))


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("packing", ["directory", "directory within", "archive", "archive within"])
def test_cifar_archives_are_read_as_they_were_written(name, kind, packing, tmp_path):
    made = make_cifar(tmp_path / "set" / "files", name, kind)
    place = {"directory": tmp_path / "set" / "files", "directory within": tmp_path / "set"}.get(packing)
    if place is None:
        (tmp_path / "packed").mkdir()
        archive = tmp_path / "packed" / "any name.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "set" / "files", arcname="some-folder")
        place = archive if packing == "archive" else archive.parent
    read = load(name, place)
    for split, (images, labels) in zip((read.train, read.test), made, strict=True):
        assert np.array_equal(split.images.numpy(), images)
        assert np.array_equal(split.labels.numpy(), labels)
    assert read.classes == (10 if name == "cifar10" else 100)


def refused(place, name, *words):
    with pytest.raises(UserError) as caught:
        load(name, place)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_cut_cifar_file_is_named(name, kind, tmp_path):
    make_cifar(tmp_path, name, kind)
    path = tmp_path / FILES[name, kind][0][0]
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, name, re.escape(str(path)), "cut short|damaged")


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_a_label_out_of_range_is_named(kind, tmp_path):
    make_cifar(tmp_path, "cifar10", kind)
    path = tmp_path / FILES["cifar10", kind][1][0]
    path.write_bytes(cifar_file(np.zeros((2, PIXELS), np.uint8), np.array([3, 10], np.uint8), "cifar10", kind))
    refused(tmp_path, "cifar10", re.escape(str(path)), "label 10")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (python2_pickle(np.zeros((2, PIXELS), np.uint8), [1], b"labels"), "2 images and 1 labels"),
        (python2_pickle(np.zeros((2, 3000), np.uint8), [1, 1], b"labels"), r"shape \(2, 3000\)"),
        (python2_pickle(np.zeros((1, PIXELS), np.uint8), [1], b"fine_labels"), "'labels'"),
        (pickle.dumps([1, 2]), "no dict"),
        (b"", "damaged"),
    ],
)
def test_a_cifar_pickle_of_another_content_is_refused(content, word, tmp_path):
    make_cifar(tmp_path, "cifar10", "python")
    (tmp_path / "data_batch_3").write_bytes(content)
    refused(tmp_path, "cifar10", "data_batch_3", word)


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_cifar_pickle_cannot_run_code(tmp_path):
    make_cifar(tmp_path, "cifar10", "python")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": _Touch(tmp_path / "touched")}))
    refused(tmp_path, "cifar10", "data_batch_1", "names .*open")
    assert not (tmp_path / "touched").exists()


def test_missing_and_damaged_archives_are_named(tmp_path):
    refused(tmp_path / "nowhere", "cifar10", "nowhere", "no such")
    refused(tmp_path, "cifar100", "does not hold cifar100", "train.bin")
    make_cifar(tmp_path / "set", "cifar10", "binary")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "set", arcname="folder")
    archive.write_bytes(archive.read_bytes()[:-2000])
    refused(archive, "cifar10", "cifar.tar.gz", "cut short")
    archive.write_bytes(b"no archive")
    refused(archive, "cifar10", "cifar.tar.gz", "damaged")


@pytest.mark.parametrize("options", [{"limit": 1298}, {"holdout": 1297}, {"limit": 1200, "holdout": 98}])
def test_more_images_than_there_are_cannot_be_asked_for(options):
    with pytest.raises(UserError, match=r"--limit and --holdout: digits has 1297 training images"):
        data.load(DataOptions("digits", **options))


def test_shrinking_takes_the_rounded_mean_of_each_square():
    whole, half = (data.load(DataOptions("digits", holdout=10, shrink=shrink)) for shrink in (1, 2))
    for name in ("train", "validation", "test"):
        images, small = getattr(whole, name).images.double(), getattr(half, name).images
        assert small.dtype == torch.uint8
        means = images.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
        assert torch.equal(means.round(), small.double())
        assert torch.equal(getattr(whole, name).labels, getattr(half, name).labels)


def test_an_option_that_leaves_the_images_alone_is_not_a_new_setting():
    args = Parser()
    cli.add_comparison(args, "classification", "small")
    plain, shrunk = (
        cli.comparison(args.parse_args([*more, "--out", "x"]))[0].settings() for more in ([], ["--shrink", "2"])
    )
    assert "shrink" not in plain["data"]
    assert shrunk["data"]["shrink"] == 2


def test_inputs_have_mean_0_and_deviation_1_in_each_channel():
    task = create("classification", DataOptions("digits", limit=640))
    inputs = torch.cat([inputs for inputs, _ in task.batches(0, 0, 64)])
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    task = create("classification", DataOptions("digits", limit=100, augment=True))
    first = [labels for _, labels in task.batches(0, 0, 32)]
    assert [len(labels) for labels in first] == [32, 32, 32, 4]
    same, other = (
        [torch.cat([x.flatten() for x in part]) for part in zip(*task.batches(0, epoch, 32), strict=True)]
        for epoch in (0, 1)
    )
    again = [torch.cat([x.flatten() for x in part]) for part in zip(*task.batches(0, 0, 32), strict=True)]
    assert all(map(torch.equal, same, again))
    assert not torch.equal(same[1], other[1])
    assert not torch.equal(order(100, 0, 1), order(100, 1, 0))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 1), (2, 0), (1, 2)])
def test_an_image_is_shifted_and_mirrored_as_drawn(row, column, mirrored):
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5) + 1
    draws = torch.tensor([row, 1]), torch.tensor([column, 1]), torch.tensor([mirrored, False])
    result = shift_and_mirror(images, (1, 1), *draws)
    padded = np.pad(images[0].numpy(), ((0, 0), (1, 1), (1, 1)))[:, row : row + 4, column : column + 5]
    assert np.array_equal(result[0].numpy(), padded[:, :, ::-1] if mirrored else padded)
    assert torch.equal(result[1], images[1])  # drawn as the middle, unmirrored: itself


def test_augmentation_draws_every_shift_and_mirrors_half():
    draws = Augmentation(4000, (32, 32), True, seed=3, epoch=0)
    assert draws.pad == (4, 4)
    assert set(draws.rows.tolist()) == set(draws.columns.tolist()) == set(range(9))
    assert abs(draws.mirrored.float().mean() - 0.5) < 0.05
    assert not Augmentation(4000, (8, 8), False, seed=3, epoch=0).mirrored.any()


def test_augmentation_of_a_batch_uses_the_draws_of_its_place():
    images = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = Augmentation(7, (16, 16), True, seed=0, epoch=5)
    whole = draws.apply(images, 0)
    parts = torch.cat([draws.apply(images[:3], 0), draws.apply(images[3:], 3)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, images)


def make_folder(root, each=4):
    """Two classes, 4 training and 2 test images each; red ones and blue ones of 40 x 30 pixels."""
    for part, count in (("train", each), ("val", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), colour).save(root / part / name / f"{i}.png")


@pytest.mark.parametrize("loaders", [0, 1])
def test_image_folders_are_read_with_their_labels(loaders, tmp_path):
    make_folder(tmp_path)
    task = create("classification", DataOptions("imagefolder", str(tmp_path), holdout=2, augment=True, loaders=loaders))
    assert task.about()["images"] == {"train": 6, "validation": 2, "test": 4}
    seen = list(task.batches(0, 0, 4))
    assert [tuple(inputs.shape) for inputs, _ in seen] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    for inputs, labels in seen:
        assert torch.equal((inputs[:, 0] > inputs[:, 2]).flatten(1).all(dim=1), labels == 1)
    images, labels = next(task.evaluation_batches("test"))
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1]


def test_random_crops_are_a_function_of_seed_epoch_and_image(tmp_path):
    make_folder(tmp_path)
    for path in (tmp_path / "train").glob("*/*"):
        Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    files = image_folder.scan(str(tmp_path)).train
    crops = [image_folder.Images(files, (0, epoch))[3][0] for epoch in (1, 1, 2)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_the_centre_of_an_image_is_evaluated(tmp_path):
    make_folder(tmp_path)
    pixels = np.zeros((256, 300, 3), np.uint8)
    pixels[16:240, 38:262] = 255  # 224 x 224 pixels of 256 x 256
    Image.fromarray(pixels).save(tmp_path / "val" / "red" / "0.png")
    samples = image_folder.scan(str(tmp_path)).test
    (image,) = (image_folder.Images([sample])[0][0] for sample in samples if sample[0].match("red/0.png"))
    assert (image == 255).all()


def test_random_crops_leave_the_global_random_state_alone(tmp_path):
    make_folder(tmp_path)
    images = image_folder.Images(image_folder.scan(str(tmp_path)).train, (0, 0))
    before = torch.get_rng_state()
    assert images[0][0].shape == (3, 224, 224)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("loaders", [0, 1])
def test_an_image_file_that_breaks_later_is_named_in_one_sentence(loaders, tmp_path):
    make_folder(tmp_path)
    task = create("classification", DataOptions("imagefolder", str(tmp_path), loaders=loaders))
    (tmp_path / "val" / "red" / "1.png").write_bytes(b"no image")  # after all files have been checked
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/val/red/1.png: not a readable image .*\.$"):
        list(task.evaluation_batches("test"))


def test_folders_that_do_not_fit_are_named(tmp_path):
    def refused_folder(*words):
        with pytest.raises(UserError) as caught:
            create("classification", DataOptions("imagefolder", str(tmp_path)))
        assert all(word in str(caught.value) for word in words), str(caught.value)

    refused_folder("train", "no such directory")
    make_folder(tmp_path)
    (tmp_path / "val" / "green").mkdir()
    refused_folder("green", "holds no")
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "green" / "1.png")
    refused_folder("green", "not in")
