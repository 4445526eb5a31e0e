# SPDX-License-Identifier: Apache-2.0
"""Graphs, streams, several devices, launches: what only a GPU has. The other tests take CUDA among their devices."""

import pytest
import torch

from csgd_cuda import CSGD, calibrate_grad

from ..conftest import need_kernel
from ..helpers import DTYPES, assert_same_bits, assert_same_snapshots, heavy_tailed, make_params, run_steps, snapshot

CUDA = torch.device("cuda")
SHAPES = [(1000,), (64, 9), (3,), (70000,)]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    need_kernel(CUDA)


def gradients(step, dtype):
    generator = torch.Generator().manual_seed(step)
    return [heavy_tailed(shape, generator, dtype).to(CUDA) for shape in SHAPES]


def optimizer_with_grads(dtype, lr):
    params = make_params(SHAPES, dtype, CUDA)
    for param in params:
        param.grad = torch.zeros_like(param)
    return params, CSGD(params, lr=lr, momentum=0.9, fused=True, capturable=True)


def step_with(params, step, dtype, make_step):
    with torch.no_grad():
        for param, grad in zip(params, gradients(step, dtype), strict=True):
            param.grad.copy_(grad)
    make_step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_graph_replays_are_eager_steps(dtype, scaled):
    """100 replays make the bits of 100 eager steps: step, bound and learning rate are read on the device."""
    results = []
    for graphed in (True, False):
        lr = torch.tensor(0.1, device=CUDA)
        params, optimizer = optimizer_with_grads(dtype, lr)
        if scaled:
            optimizer.grad_scale = torch.tensor(2.0, device=CUDA)
            optimizer.found_inf = torch.tensor(0.0, device=CUDA)
        step_with(params, 0, dtype, optimizer.step)  # makes the state
        make_step = optimizer.step
        if graphed:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            make_step = graph.replay
        for step in range(1, 101):
            lr.fill_(0.1 / step)
            if scaled:
                optimizer.found_inf.fill_(float(step % 10 == 0))
            step_with(params, step, dtype, make_step)
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)
    steps = [int(tensor) for name, tensor in results[0] if name.startswith("step")]
    assert steps == [91 if scaled else 101] * len(SHAPES)


def test_step_runs_on_the_current_stream():
    """A step on a side stream waits for the gradient that this stream still computes."""
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
        (param,) = params = make_params([(2**20,)], torch.float32, CUDA)
        optimizer = CSGD(params, lr=0.1, momentum=0.9, fused=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            big = torch.ones(4096, 4096, device=CUDA)
            for _ in range(20):
                big = big @ big / 4096
            param.grad = big.view(-1)[: 2**20].clone()
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


def test_one_optimizer_over_several_devices():
    devices = [torch.device("cpu")] + [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    mixed = [p for k in range(6) for p in make_params([(300 + k,)], torch.float32, devices[k % len(devices)], seed=k)]
    on_cpu = [p for k in range(6) for p in make_params([(300 + k,)], torch.float32, seed=k)]
    results = [snapshot(params, run_steps(params, fused=True)) for params in (mixed, on_cpu)]
    assert_same_snapshots(*results)


def kernel_launches(step):
    """The CUDA kernels that one call launches, by name."""

    def on_gpu(event):  # the timeline of the GPU also has the optimizer's mark of its step
        return event.device_type.name == "CUDA" and not event.is_user_annotation

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [e.key for e in profile.key_averages() for _ in range(e.count) if on_gpu(e)]


@pytest.mark.parametrize(("tensors", "launches"), [(161, 1), (500, 1), (1200, 3)])
def test_a_model_is_one_launch(tensors, launches):
    params = make_params([(40,)] * tensors, torch.float32, CUDA)
    optimizer = run_steps(params, steps=2, fused=True)
    names = kernel_launches(optimizer.step)
    assert len(names) == launches, names
    assert all("step_kernel" in name for name in names)


def test_21000_tiny_tensors():
    shapes = [(1 + k % 7,) for k in range(21000)]
    results = []
    for device in ("cpu", "cuda"):
        params = make_params(shapes, torch.float32, device)
        optimizer = run_steps(params, steps=2, fused=True)
        joined = [torch.cat([p.detach().cpu() for p in params])]
        joined += [torch.stack([optimizer.state[p]["lipschitz_bound"].cpu() for p in params])]
        results.append(joined)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


class Layer:
    """A calibration's state on one device; calling it calibrates a gradient, with a bound for each of 9 channels."""

    def __init__(self, device):
        self.index = torch.tensor(2, device=device)
        self.step = torch.tensor(0, device=device)
        self.bound = torch.zeros(9, dtype=torch.float64, device=device)
        self.tally = torch.zeros(4 + 9, dtype=torch.int64, device=device)

    def __call__(self, grad):
        return calibrate_grad(
            grad, index=self.index, step=self.step, lipschitz_bound=self.bound, channel_dim=1, tally=self.tally, seed=3,
            fused=True,
        )  # fmt: skip

    def state(self):
        return [t.clone() for t in (self.step, self.bound, self.tally)]


def image_gradient(step, dtype, memory_format=torch.contiguous_format):
    grad = heavy_tailed((40, 9, 11, 7), torch.Generator().manual_seed(step), dtype)
    return grad.to(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calibrations_have_the_bits_of_the_cpu(dtype, memory_format):
    """The bounds and the tally have them, too, over several calls; the scratch words after the tally are zero again."""
    on_cpu, on_gpu = Layer("cpu"), Layer(CUDA)
    for step in range(5):
        grad = image_gradient(step, dtype, memory_format)
        assert_same_bits(on_gpu(grad.to(CUDA)), on_cpu(grad), f"call {step}")
        for a, b in zip(on_gpu.state(), on_cpu.state(), strict=True):
            assert_same_bits(a, b, f"state after call {step}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replays_are_eager_calibrations(dtype):
    """The step and the bounds are read on the device, so each replay draws anew."""
    results = []
    for graphed in (True, False):
        layer, grad, out = Layer(CUDA), image_gradient(0, dtype).to(CUDA), []
        layer(grad)
        if graphed:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(grad)
        for step in range(1, 21):
            grad.copy_(image_gradient(step, dtype))
            if graphed:
                graph.replay()
            out.append((captured if graphed else layer(grad)).clone())
        results.append(out + layer.state())
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert int(results[0][20]) == 21


def test_calibration_runs_on_the_current_stream():
    """A calibration on a side stream waits for the gradient that this stream still computes."""
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
        layer = Layer(CUDA)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            big = torch.ones(4096, 4096, device=CUDA)
            for _ in range(20):
                big = big @ big / 4096
            out = layer(big.view(-1)[: 9 * 2**17].view(-1, 9))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        results.append([out, *layer.state()])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(40, 9, 11, 7), (0, 9), (200000, 9)])
def test_a_calibration_is_one_launch(shape):
    layer, grad = Layer(CUDA), torch.ones(shape, device=CUDA)
    layer(grad)
    names = kernel_launches(lambda: layer(grad))
    assert len(names) == 1, names
    assert "calibrate_grad_kernel" in names[0]


def test_a_calibration_never_waits_for_the_device():
    layer, grad = Layer(CUDA), image_gradient(0, torch.float32).to(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
