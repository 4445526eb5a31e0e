# SPDX-License-Identifier: Apache-2.0
"""Image folders as people have them: every kind of pixel, damaged files, odd names, and things that are no images."""

import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.__main__ import main
from experiments.data import image_files, image_folder
from experiments.grid import create_task
from experiments.methods import Method
from experiments.schedule import Schedule
from experiments.settings import Execution, Recipe, Run
from experiments.task import DataOptions, create
from tools.program import UserError

GREYS = np.array([[0, 1, 10, 200, 254, 255]], np.uint8)
GREYS_16 = GREYS.astype(np.uint16) * 257  # the same brightnesses of 0 ... 65535


def png(pixels, bits, colour_type):
    """A PNG file of rows of big-endian bytes; colour type 0: grey, 2: RGB, 4: grey and alpha, 6: RGBA."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_12_bits(values):
    """An uncompressed TIFF of one row of an even number of values of 0 ... 4095."""
    pairs = zip(values[::2], values[1::2], strict=True)
    strip = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(strip)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def big_endian(pixels):
    return pixels.astype(">u2")


RGB_16 = np.stack([GREYS_16, 0 * GREYS_16, GREYS_16[:, ::-1]], axis=2)
BYTES = {
    "16-bit grey.png": png(big_endian(GREYS_16), 16, 0),
    "16-bit grey and alpha.png": png(big_endian(np.stack([GREYS_16, 0 * GREYS_16], axis=2)), 16, 4),
    "16-bit grey.pgm": b"P5 6 1 65535\n" + big_endian(GREYS_16).tobytes(),
    "12-bit grey.pgm": b"P5 6 1 4095\n" + big_endian(GREYS * np.uint16(16)).tobytes(),
    "12-bit grey.tif": tiff_of_12_bits((GREYS[0].astype(int) * 16).tolist()),
}


@pytest.mark.parametrize("name", BYTES)
def test_greys_of_more_than_8_bits_keep_their_brightness(name, tmp_path):
    (tmp_path / name).write_bytes(BYTES[name])
    assert_greys(image_files.read(tmp_path / name))


@pytest.mark.parametrize(("array", "options"), [
    (GREYS_16, {}), (big_endian(GREYS_16), {}), (GREYS_16, {"compression": "tiff_lzw"}),
    (65535 - GREYS_16, {"tiffinfo": {262: 0}}),
], ids=["little-endian", "big-endian", "lzw", "0 is white"])  # fmt: skip
def test_tiff_of_16_bits_keeps_its_brightness(array, options, tmp_path):
    Image.fromarray(array).save(tmp_path / "image.tiff", **options)
    assert_greys(image_files.read(tmp_path / "image.tiff"))


def assert_greys(image):
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(GREYS[:, :, None], 3, axis=2))


def test_values_between_those_of_8_bits_are_rounded_down():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(image_files._to_rgb(Image.fromarray(values)))[..., 0], values // 256)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)])
def test_colours_of_16_bits(colour_type, channels, tmp_path):
    pixels = np.concatenate([RGB_16, 0 * RGB_16[..., :1]], axis=2)[..., :channels]
    (tmp_path / "a.png").write_bytes(png(big_endian(pixels), 16, colour_type))
    assert np.array_equal(np.asarray(image_files.read(tmp_path / "a.png")), RGB_16 // 257)


def test_black_and_white(tmp_path):
    Image.fromarray(GREYS > 128).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image_files.read(tmp_path / "a.png"))[..., 0], np.where(GREYS > 128, 255, 0))


@pytest.mark.parametrize("name", ["a.bmp", "a.PNG", "a.ppm", "a.tif", "a.TIFF", "a.webp", "a.jpg"])
def test_usual_formats_are_read(name, tmp_path):
    Image.new("RGB", (16, 16), (250, 128, 0)).save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
    ((path,), others) = image_files.sort_out(tmp_path)
    assert not others
    assert np.abs(np.asarray(image_files.read(path)).astype(int) - (250, 128, 0)).max() <= 2


def test_palettes_transparency_and_cmyk_become_rgb_without_a_warning(tmp_path):
    """Transparency is dropped: the colours are those below it, as in torchvision."""
    red = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    red.save(tmp_path / "alpha.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=b"\0\0")
    Image.new("RGB", (8, 8), (200, 0, 0)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("LA", (8, 8), (200, 0)).save(tmp_path / "grey.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("alpha.png", "palette.png", "cmyk.jpg"):
            pixels = np.asarray(image_files.read(tmp_path / name)).astype(int)
            assert np.abs(pixels - (200, 0, 0)).max() <= 3, name
        assert (np.asarray(image_files.read(tmp_path / "grey.png")) == 200).all()


@pytest.mark.parametrize("name", ["animation.webp", "pages.tif"])
def test_the_first_frame_or_page_counts(name, tmp_path):
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green"))
    first.save(tmp_path / name, save_all=True, append_images=others, **({"lossless": True} if "webp" in name else {}))
    assert image_files.read(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_orientation_of_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert image_files.read(tmp_path / "a.jpg").size == (16, 8)


def make_folder(root, each=3):
    for part in ("train", "val"):
        for name, colour in (("blue", "blue"), ("red", "red")):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (12, 9), colour).save(root / part / name / f"{i}.png")
    return root


def training_of(root):
    """The arguments of a short training on the images in ``root``."""
    return [
        "classification", "--workers", "1", "--data", "imagefolder", "--data-dir", str(root), "--model", "small",
        "--seeds", "0", "--methods", "sgd", "--epochs", "1", "--out", str(root / "out"),
    ]  # fmt: skip


def damage(folder):
    """Files that cannot be read, {name: a word of what is said of it}."""
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.bmp").write_text("no image")
    (folder / "lost.png").symlink_to(folder / "nowhere")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    Image.new("F", (4, 4)).save(folder / "float.tif")
    Image.new("I", (4, 4)).save(folder / "int.tif")
    return {
        "truncated.jpg": "truncated", "empty.png": "Unidentified", "text.bmp": "Unidentified", "loop.png": "symbolic",
        "lost.png": "No such file", "float.tif": "mode F", "int.tif": "mode I",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["truncated.jpg", "empty.png", "text.bmp", "lost.png", "loop.png", "float.tif"])
def test_one_unreadable_file_is_named_before_the_training(name, tmp_path):
    folder = make_folder(tmp_path) / "val" / "red"
    words = damage(folder)
    for other in words.keys() - {name}:
        (folder / other).unlink()
    with pytest.raises(UserError) as caught:
        create("classification", DataOptions("imagefolder", str(tmp_path)))
    assert str(caught.value).startswith(f"{folder / name}: not a readable image (")
    assert words[name] in str(caught.value)
    assert str(caught.value).endswith("replace or remove it, or leave it out with --skip-unreadable.")


def test_all_unreadable_files_are_named(tmp_path, capsys):
    words = damage(make_folder(tmp_path) / "train" / "red")
    with pytest.raises(UserError, match=r"^7 of 19 image files are not readable: ") as caught:
        image_folder.scan(str(tmp_path))
    for name in words:
        assert str(tmp_path / "train" / "red" / name) in str(caught.value)
    for i in range(10):
        (tmp_path / "val" / "red" / f"{i}.bmp").touch()
    with pytest.raises(UserError, match=r"^17 of 29 .*, and 7 more; replace or remove them"):
        image_folder.scan(str(tmp_path))


def test_unreadable_files_are_skipped_counted_and_named(tmp_path, capsys):
    words = damage(make_folder(tmp_path) / "train" / "red")
    task = create("classification", DataOptions("imagefolder", str(tmp_path), skip_unreadable=True))
    said = capsys.readouterr().err
    assert said.startswith("--skip-unreadable: leaves out 7 of 19 image files: ")
    assert all(f"{tmp_path / 'train' / 'red' / name} (" in said for name in words)
    assert task.about()["images"] == {"train": 6, "test": 6}
    assert sorted(torch.cat([labels for _, labels in task.batches(0, 0, 4)]).tolist()) == [0, 0, 0, 1, 1, 1]
    for name in words:
        (tmp_path / "train" / "red" / name).unlink()
    assert create("classification", DataOptions("imagefolder", str(tmp_path))).about() == task.about()


def test_the_option_to_skip_is_on_the_command_line(no_plots, tmp_path, capsys):
    damage(make_folder(tmp_path) / "val" / "red")
    arguments = training_of(tmp_path)
    assert main(arguments) == 2
    assert "7 of 19 image files are not readable" in capsys.readouterr().err
    assert main([*arguments, "--skip-unreadable"]) == 0
    assert "leaves out 7 of 19 image files" in capsys.readouterr().err


def test_a_class_without_readable_images_is_named(tmp_path):
    for path in (make_folder(tmp_path) / "val" / "red").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'val' / 'red'))}: holds no readable image"):
        image_folder.scan(str(tmp_path), skip_unreadable=True)


def test_what_is_left_out_is_counted(tmp_path, capsys):
    train = make_folder(tmp_path) / "train"
    (train / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (4, 4)).save(train / ".ipynb_checkpoints" / "a-checkpoint.png")
    (train / "labels.csv").touch()
    (train / "red" / ".ipynb_checkpoints").mkdir()
    (train / "red" / "._0.png").touch()  # as macOS leaves it beside each file
    (train / "red" / "more.png").mkdir()
    os.mkfifo(train / "red" / "pipe.png")
    (train / "red" / "parent").symlink_to(train)
    for name in ("a.GIF", "b.gif", "notes", "notes.txt"):
        (train / "red" / name).touch()
    folder = image_folder.scan(str(tmp_path))
    assert folder.classes == ["blue", "red"]
    assert len(folder.train) == 6
    assert capsys.readouterr().err == (
        f"{train}: left out besides the images: 2 .gif, 2 folder(s), 2 hidden, 1 .txt, 1 beside the classes, "
        "1 hidden folder(s), 1 no regular file(s), 1 without a suffix.\n"
    )


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capsys):
    image_folder.scan(str(make_folder(tmp_path)))
    assert capsys.readouterr() == ("", "")


def test_an_empty_class_is_named_with_what_is_in_it(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "green").mkdir()
    with pytest.raises(UserError, match=r"green: holds no \.bmp, .* files; put some in"):
        image_folder.scan(str(tmp_path))
    (tmp_path / "train" / "green" / "a.gif").touch()
    with pytest.raises(UserError, match=r"green: holds no .* files, but 1 \.gif; put some in"):
        image_folder.scan(str(tmp_path))


ODD = {"no UTF-8": b"caf\xe9", "two lines": b"two\nlines", "UserError: ": b"UserError: name", "UTF-8": "café".encode()}
PRINTED = {
    "no UTF-8": r"caf\udce9", "two lines": r"two\nlines", "UserError: ": "UserError: name", "UTF-8": "café",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_any_file_name_is_trained_on_or_named(name, no_plots, tmp_path, capsys):
    """In one line of the message, in whatever encoding it is printed."""
    make_folder(tmp_path)
    for part in ("train", "val"):
        os.rename(tmp_path / part / "red", os.fsencode(tmp_path / part) + b"/" + ODD[name])
    red = os.fsencode(tmp_path / "train") + b"/" + ODD[name]
    os.rename(red + b"/0.png", red + b"/" + ODD[name] + b".png")
    arguments = [*training_of(tmp_path), "--loaders", "1"]
    assert main(arguments) == 0
    capsys.readouterr()
    create_task.cache_clear()
    with open(red + b"/" + ODD[name] + b".png", "wb") as file:
        file.write(b"no image")
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = f"{tmp_path}/train/{PRINTED[name]}/{PRINTED[name]}.png"
    assert line.startswith(f"experiments: error: {place}: not a readable image (UnidentifiedImageError); replace")


@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize("name", ODD)
def test_a_file_of_any_name_that_breaks_later_is_named_in_one_line(name, loaders, tmp_path):
    path = os.fsencode(make_folder(tmp_path) / "val" / "red") + b"/" + ODD[name] + b".png"
    os.rename(tmp_path / "val" / "red" / "2.png", path)
    task = create("classification", DataOptions("imagefolder", str(tmp_path), loaders=loaders))
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(UserError) as caught:
        list(task.evaluation_batches("test"))
    place = f"{tmp_path}/val/red/{PRINTED[name]}.png"
    assert str(caught.value) == f"{place}: not a readable image (UnidentifiedImageError); replace or remove it."


def test_checksum_of_names_is_that_of_earlier_logs(tmp_path):
    names = [f"{folder}/{path}.png\n" for folder in ("blue", "red") for path in range(3)]
    folder = image_folder.scan(str(make_folder(tmp_path)))
    shuffled = [f"{path.parent.name}/{path.name}\n" for path, _ in folder.train]
    assert sorted(shuffled) == names
    assert folder.checksum() == f"{zlib.crc32(''.join([*shuffled, *names]).encode()):08x}"


def test_how_files_are_read_is_no_setting_of_a_run():
    """Or the runs of earlier versions would not count as finished."""
    recipe = Recipe(1, 1, Schedule("constant", 1), 0.9, 0.0, False)

    def settings(**reading):
        data = DataOptions("imagefolder", **reading)
        return Run("classification", data, "small", recipe, Execution(), Method("sgd", None), 0.1, 0, {}).settings()

    assert settings(directory="here", loaders=3, skip_unreadable=True) == settings()
    assert settings()["data"] == {"data": "imagefolder", "limit": None, "holdout": 0, "augment": False}
