# SPDX-License-Identifier: Apache-2.0
"""A few calls of every kernel: every dtype, tails, misalignment, options.

    python tools/call_kernels.py --compare                  # on a GPU and on the CPU: the same bits? Takes seconds.
    compute-sanitizer python tools/call_kernels.py          # on a GPU, short enough for it

Exit status: 0, or 1 where a result differs or there is no kernel.
"""

import argparse
import sys
from os import environ
from pathlib import Path

# Each tensor an allocation of its own: in a block of torch's cache no access beyond a tensor's end would be seen.
environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from output import say

from csgd_cuda import CSGD, CalibratedAdamW, calibrate_grad, hard_threshold_
from csgd_cuda.distributed.coding import choose_coding
from csgd_cuda.distributed.shards import ShardLayout
from tests.helpers import DTYPES, assert_same_bits, heavy_tailed, step_operator


def values(shapes, dtype, device, seed):
    """As those of gradients: the last of the tensors is misaligned."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [heavy_tailed(shape, generator, dtype).to(device) for shape in shapes]
    last = tensors[-1]
    base = torch.zeros(last.numel() + 3, dtype=dtype, device=device)
    return [*tensors[:-1], base[3:].view(last.shape).copy_(last)]


def stepped(shapes, device, dtype, count, optimizer_class=CSGD, **options):
    """Makes so many steps; all that they change, beside the counts of coordinates; and the optimizer."""
    params = [param.requires_grad_() for param in values(shapes, dtype, device, 0)]
    usual = {"lr": 0.1, "momentum": 0.9} if optimizer_class is CSGD else {"lr": 0.1}
    optimizer = optimizer_class(params, **{**usual, **options}, fused=True)
    for step in range(count):
        for param, grad in zip(params, values(shapes, dtype, device, step + 1), strict=True):
            param.grad = grad
        optimizer.step()
    return [*params, *(tensor for param in params for tensor in optimizer.state[param].values())], optimizer


def steps(device, dtype):
    shapes = [(n,) for n in (0, 1, 9, 2049, 70000, 4997)]
    for options in (
        {}, {"weight_decay": 0.1, "nesterov": True}, {"momentum": 0.0, "lipschitz": 1.0},
        {"optimizer_class": CalibratedAdamW}, {"optimizer_class": CalibratedAdamW, "weight_decay": 0.0},
    ):  # fmt: skip
        changed, optimizer = stepped(shapes, device, dtype, 2, **options)
        yield from changed
        yield torch.tensor(list(optimizer.density().values()))


def shards(device, dtype):
    shapes = [(n,) for n in (0, 1, 9, 2049, 70000)]
    for layout in (
        ShardLayout(1003, 70000, 70000, 1, 70000),
        ShardLayout(5, 3, 10, 7, 70),
        ShardLayout(2, 1, 7, 9, 63),
    ):
        params, grads, buffers = (values(shapes, dtype, device, seed) for seed in range(3))
        counts = [torch.tensor(1, device=device) for _ in params]
        options = {"lr": 0.1, "momentum": 0.9, "lipschitz": 1.0, "fused": True}
        step_operator(params, grads, buffers, counts, [], shards=[layout] * len(params), **options)
        yield from (*params, *buffers, *counts)


def calibrations(device, dtype):
    grads = values([(n, 3) for n in (0, 1, 683, 30000)] + [(4997, 1)], dtype, device, 0)
    for grad in grads:
        state = {"index": torch.tensor(0, device=device), "step": torch.tensor(0, device=device)}
        for bound in (
            {"lipschitz_bound": torch.zeros(grad.shape[1], dtype=torch.float64, device=device), "channel_dim": 1},
            {"lipschitz_bound": torch.zeros((), dtype=torch.float64, device=device)},
            {"lipschitz": 1.0},
        ):
            for _ in range(2):
                yield calibrate_grad(grad, **state, **bound, fused=True)
            yield from (tensor for tensor in bound.values() if isinstance(tensor, torch.Tensor))


def prunings(device, dtype):
    """Steps of pruned parameters, with all structures."""
    shapes = [(1, 4), (3, 8), (64, 32, 1), (300, 4, 3, 3), (70, 300), (100, 48)]
    for options in (
        {}, {"regrow": False}, {"threshold_scope": "group"}, {"threshold_scope": "group", "regrow": False},
        {"structure": "filter"}, {"structure": "filter", "regrow": False}, {"structure": "2:4", "regrow": False},
    ):  # fmt: skip
        changed, _ = stepped(shapes, device, dtype, 4, sparsity=0.5, threshold_every=2, **options)
        yield from changed
    params = changed[: len(shapes)]
    masks = [(param > 0)[1:] for param in params]  # at any address
    parts = [param.detach()[1:] for param in params]
    hard_threshold_(parts, [1000], masks=masks, across=True, fused=True)
    yield from (*parts, *masks)


def exchanges(device, dtype):
    if dtype == torch.float64:  # which is not coded
        return
    coding = choose_coding(device, fused=True)
    for ranks in (1, 3, 24):
        grads = values([(n,) for n in (1, 9, 2049, 70000)], dtype, device, 0)
        largest = [grad.abs().max().double() for grad in grads]
        units = torch.stack(largest).to(torch.bfloat16).double() * (2.0 / ranks)
        codes = coding.encode(grads, units * ranks, range(len(grads)), seed=1, step=0)
        words = coding.pack(codes, ranks)
        coding.decode(coding.add(words).expand(ranks, -1).contiguous(), units, grads)
        yield from (codes, words, *grads)


CALLS = {f.__name__: f for f in (steps, shards, calibrations, exchanges, prunings)}


def compare(device):
    """Compares each result with the CPU's; prints what differs. Returns how many kernels' results do."""
    differ = 0
    for name, calls in CALLS.items():
        try:
            for dtype in DTYPES:
                for number, (expected, got) in enumerate(
                    zip(calls(torch.device("cpu"), dtype), calls(device, dtype), strict=True)
                ):
                    assert_same_bits(expected, got, f"{dtype}, tensor {number}")
            say(f"{name}: the same bits")
        except AssertionError as error:
            differ += 1
            say(f"{name}: {error}")
    return differ


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="with the same calls on the CPU")
    parser.add_argument("--device", type=torch.device, default="cuda", help="default: %(default)s")
    args = parser.parse_args()
    if args.compare:
        return int(compare(args.device) > 0)
    for calls in CALLS.values():
        for dtype in DTYPES:
            for _ in calls(args.device, dtype):
                pass
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    say(f"called: {', '.join(CALLS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
