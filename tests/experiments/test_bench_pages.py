# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that write one page, bench_layer, bench_threshold and bench_exchange; wrong options of all that do."""

import pytest
import torch

from benchmarks import bench_exchange, bench_layer, bench_threshold, kills, soak

pytestmark = pytest.mark.usefixtures("one_thread")

# Program, arguments of a tiny run, the file, its title, and the first cells of its rows: exactly these.
TINY = [
    (
        bench_layer, ["--size", "8", "--batch-size", "2", "--repeat", "2"], "layer-cpu-resnet20.md",
        "The layer in a training step of resnet20, cpu", list(bench_layer.PLACES),
    ),
    (
        bench_threshold, ["--sizes", "100", "400", "--repeat", "3"], "threshold-cpu.md",
        "Hard thresholding, cpu, float32, sparsity 0.9", ["100"] * 7 + ["400"] * 7,
    ),
    (
        bench_exchange, ["--numel", "1000", "--ranks", "3", "--repeat", "2", "--reference"],
        "exchange-cpu-reference.md", "What a rank computes for an exchange of codes, cpu, pure PyTorch",
        ["copy of the gradient", "largest magnitude", "encode", "pack", "add (unpack, add, pack)",
         "decode (unpack, multiply)", "all of it", "compact: write codes", "compact: read codes",
         "compact: write the sums of a shard", "compact: read sums", "clip 4: norm, outliers taken and given back",
         "blocks of 32: exponents, scaled there and back"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "arguments", "file", "title", "first_cells"), TINY, ids=["layer", "threshold", "exchange"]
)
def test_tiny_run_writes_a_page_of_figures(program, arguments, file, title, first_cells, tmp_path, capsys):
    assert program.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / file).read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert str(tmp_path) not in text
    assert text.startswith(f"# {title}\n\n- date: ")
    name = program.__name__.rpartition(".")[2]
    assert f"\n- command: python benchmarks/{name}.py {' '.join(arguments)}\n" in text
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [cells[0].strip() for cells in rows[2:]] == first_cells
    times = [float(cells[2 if program is bench_threshold else 1]) for cells in rows[2:]]
    assert all(time >= 0 for time in times)
    assert max(times) > 0


@pytest.mark.parametrize(
    ("program", "options", "named"),
    [
        (bench_layer, ["--repeat", "1"], "--repeat 2 or more"),
        (bench_threshold, ["--sparsity", "1"], "--sparsity must be between 0 and 1"),
        (bench_exchange, ["--numel", "0"], "--numel"),
        (bench_exchange, ["--threads", "-1"], "--threads"),
        (soak, ["--steps", "1500"], "a multiple of --every"),
        (soak, ["--threads", "0"], "--threads"),
        (kills, ["--kills", "0"], "--kills"),
    ],
)
def test_wrong_options_end_in_one_sentence(program, options, named, tmp_path, capsys):
    assert program.main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [program for program, *_ in TINY])
def test_without_a_gpu_cuda_is_refused(program, tmp_path, capsys):
    assert program.main(["--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
