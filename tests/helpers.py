# SPDX-License-Identifier: Apache-2.0
"""What several test files share: raw bits, awkward data, steps made by one backend, and files made once."""

import contextlib
import fcntl
import math
import re
import shutil
from pathlib import Path

import torch

from csgd_cuda import CSGD, CalibratedAdamW, calibrated_adamw_, csgd_, extension
from csgd_cuda.optim.direction import SGD
from csgd_cuda.optim.options import step_options
from csgd_cuda.tensors import StepTensors

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATE_NAMES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step", "lipschitz_bound")
# Each optimizer with options for steps of which every part does something.
USUAL_OPTIONS = {CSGD: {"lr": 0.1, "momentum": 0.9}, CalibratedAdamW: {"lr": 0.1, "weight_decay": 0.1}}
OPTIMIZERS = list(USUAL_OPTIONS)
FUNCTIONS = {CSGD: csgd_, CalibratedAdamW: calibrated_adamw_}
TORCH_CLASS = {CSGD: torch.optim.SGD, CalibratedAdamW: torch.optim.AdamW}
LAYOUTS = ["contiguous", "reversed dimensions", "last dimension first", "odd offset", "strided view"]
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What an archive of the sources holds beside csrc/ and csgd_cuda/.
PACKED = ["LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]

# Around the Philox block (8), vectors of counters (64, 128), the CPU tile (256), a pass of a CUDA block (2048), the
# CPU chunk (16384) and the smallest size that wakes other threads (32768).
BOUNDARIES = [0, 1, 7, 8, 9, 1000]
BOUNDARIES += [base + off for base in (64, 128, 256, 512, 2048, 16384, 32768) for off in (-1, 0, 1)]

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
# Every backend that this machine has, as (device, fused).
BACKENDS = [
    (device, fused)
    for device in DEVICES
    for fused in (True, False)
    if not fused or extension.why_no_kernel(torch.device(device)) is None
]


def code_of(page):
    """The blocks of Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def copy_sources(folder):
    """What the package is built from, without what was built."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("csrc", "csgd_cuda"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in PACKED:
        shutil.copy(ROOT / name, folder)


def why_no_kernel(device):
    """Why there is no kernel for tensors on a device; None where there is one."""
    return extension.why_no_kernel(torch.device(device))


@contextlib.contextmanager
def instruction_set(name):
    """Runs the kernels' loops on a CPU in this instruction set; False where this machine or build does not have it."""
    usual = extension.build_info()["cpu_isa"]
    try:
        yield extension._C.set_cpu_isa(name)
    finally:
        extension._C.set_cpu_isa(usual)


@contextlib.contextmanager
def threads(count):
    """Runs torch's and the kernels' loops on ``count`` threads; the tests have one otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor):
    """The raw bits as integers on the CPU; every NaN counts as the same, since processors differ in its payload."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = tensor if tensor.dtype in DTYPES else tensor.float()  # float8 has too few operators
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
        tensor = tensor.view(_INTEGER[tensor.element_size()])
    return tensor


def assert_same_bits(a, b, what=""):
    a, b = bits(a), bits(b)
    assert a.shape == b.shape, what
    different = (a != b).nonzero()
    first = different[0].tolist() if len(different) else None
    assert first is None, f"{what}: {len(different)} of {a.numel()} differ, the first at {first}"


def snapshot(params, optimizer):
    """Copies of everything a step may change: [(name, tensor)]."""
    out = []
    for k, param in enumerate(params):
        out.append((f"param {k}", param.detach().clone()))
        state = optimizer.state.get(param, {})
        out.extend((f"{name} {k}", state[name].clone()) for name in STATE_NAMES if name in state)
    return out


def assert_same_snapshots(a, b):
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        assert_same_bits(x, y, name)


def heavy_tailed(shape, generator, dtype=torch.float32):
    """Values as gradients have them: most small, a few large, some exactly zero."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64) ** 3
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    return x.to(dtype)


def laid_out(values, layout):
    """The values as a parameter of the given layout; a view into a larger base for the last two."""
    if layout == "contiguous":
        return values.clone()
    if layout == "reversed dimensions":
        dims = list(reversed(range(values.dim())))
        return values.permute(dims).contiguous().permute(dims)
    if layout == "last dimension first":  # channels_last, for four dimensions
        return values.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "odd offset":
        base = values.new_zeros(values.numel() + 3)
        return base[3:].view(values.shape).copy_(values)
    if layout == "strided view":
        base = values.new_full((*values.shape, 3), 7.0)
        return base[..., 1].copy_(values)
    raise ValueError(layout)


def edge_values(shape, generator, dtype):
    """Gradients with zeros, subnormals, huge values, Inf and NaN among them."""
    values = heavy_tailed(shape, generator, torch.float64)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, 1e-45, -3e-42, 1e-7, 6e4, math.inf, -math.inf, math.nan, info.max, -info.tiny / 4]
    special = torch.tensor(special, dtype=torch.float64)
    pick = torch.randint(0, 4 * len(special), shape, generator=generator)
    chosen = special[pick.clamp(max=len(special) - 1)]
    return torch.where(pick < len(special), chosen, values).to(dtype)


def make_params(shapes, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = heavy_tailed(tuple(param.shape), generator, param.dtype).to(param.device)


def run_steps(params, steps=3, optimizer_class=CSGD, **options):
    """Makes steps with gradients that depend on the step alone; returns the optimizer."""
    optimizer = optimizer_class(params, **{**USUAL_OPTIONS[optimizer_class], **options})
    for step in range(steps):
        set_grads(params, seed=100 + step)
        optimizer.step()
    return optimizer


def step_operator(params, grads, *lists, direction=SGD, indices=None, shards=(), fused=False, tallies=None, **given):
    """A direction's operator, or its reference, with the arguments that csgd_ does not have: shards, tallies,
    fresh_momentum. ``lists``: of the direction's buffers, the steps and the bounds."""
    *buffers, steps, bounds = lists
    named = dict(zip(direction.buffers, buffers, strict=True))
    indices = list(range(len(params)) if indices is None else indices)
    tensors = StepTensors(params, grads, named, steps, bounds, indices, [n for row in shards for n in row])
    options = {name: option.default for name, option in direction.options.items()} | given
    of_call = {"tallies": tallies, **{name: given.get(name) for name in ("grad_scale", "found_inf")}}
    of_call |= direction.fresh_argument(given.get("fresh_momentum", False))
    kernel = extension.takes_kernel(params[0].device, fused)
    direction.step(tensors, step_options(direction.options, options, params[0].device) | of_call, kernel=kernel)


def made_once(path, make):
    """The path of a file or folder, which make(path) makes where it is not there yet: in one process, while the others
    that need it wait."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = Path(f"{path}.new")
            make(unfinished)
            unfinished.rename(path)
    return path
