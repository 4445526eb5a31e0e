# SPDX-License-Identifier: Apache-2.0
"""The communication hook for DistributedDataParallel, and its state."""

# No "from __future__ import annotations": DistributedDataParallel compares the hook's annotations with the types.

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..kinds import FLAG, FUSED, INTEGER, MODULE, NUMBER, TEXT, Kind
from .agreement import PROCESS_GROUP, agree, described, parameter_list
from .codes import SIGNIFICANT_BITS, most_ranks
from .coding import choose_coding
from .exchange import Wire, average_as_codes, average_plainly, ring_bytes
from .residuals import Residuals
from .worker_thread import WorkerThread, private_gloo_group

_NAMES = Kind("a list of parameter names", lambda skip: isinstance(skip, Iterable) and not isinstance(skip, str))
_MOST = 2**16  # parameters, and ranks: together they are one word of the draws' counter
_OPTIONS = ("seed", "clip", "block", "skip_below", "skip", "compact", "error_feedback")
_COUNTS = ("step", "bytes_sent", "bytes_plain")
_NOT_IN_EARLIER_VERSIONS = {"compact": False, "error_feedback": False}
_SAVED = ("step", *_OPTIONS, "bytes_sent", "bytes_plain")


class CalibratedHookState:
    """What ``calibrated_hook`` keeps between steps; the same on all ranks, but for the bytes.

    Args:
        module: the model, or the DistributedDataParallel around it. Its parameters are numbered in their order.
        process_group: that of the DistributedDataParallel, which may be left out where that is the module; None is the
            default group.
        seed: 0 ... 2^64 - 1. May be that of the optimizer: the draws are others.
        clip: None bounds a parameter's gradient by its largest magnitude over all ranks. A number > 0 bounds it by
            clip times its RMS (on the rank where that is largest), where that is smaller: less variance, and each
            coordinate beyond the bound is sent as it is, in its own bytes and mostly one more.
        block: a number: so many consecutive coordinates of a parameter are coded under a bound of their own, that of
            the parameter divided by a power of two: much less variance, for half a byte a block. None: all are coded
            under the bound of the parameter.
        skip_below: parameters with fewer elements are exchanged as they are.
        skip: names of parameters that are exchanged as they are, as in ``module.named_parameters()``, without the
            "module." of DistributedDataParallel.
        compact: codes and sums travel in the fewer bytes that they take where most of them are 0. On CPUs this computes
            more than twice as long, and on GPUs it waits for the device; for links up to some 100 Mbit/s.
        error_feedback: a rank's codes are the nearest ones, and what they leave of its gradient is added to its next
            one. Steps are less noisy, and more codes are 0; but the average of a step is then no unbiased estimate,
            only that of many steps is right. Takes a float32 of memory for each coordinate.
        fused: None takes the kernels where there are any for the gradients' device, else pure PyTorch; True demands
            them, False takes the latter. The bits are the same.

    Attributes:
        step: how many backward passes were exchanged.
        bytes_sent: by this rank, since the start or since ``load_state_dict``'s checkpoint's start: the payload of
            the collectives, an all-reduce or all-gather taken as a ring.
        bytes_plain: what a ring all-reduce of the same gradients in float32 would have sent.

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it.
    """

    seed: int
    clip: float | None
    block: int | None
    skip_below: int
    skip: list[str]
    compact: bool
    error_feedback: bool

    def __init__(
        self,
        module: torch.nn.Module,
        process_group: dist.ProcessGroup | None = None,
        *,
        seed: int = 0,
        clip: float | None = None,
        block: int | None = None,
        skip_below: int = 0,
        skip: Sequence[str] = (),
        compact: bool = False,
        error_feedback: bool = False,
        fused: bool | None = None,
    ) -> None:
        MODULE.check("module", module)
        PROCESS_GROUP.check("process_group", process_group)
        FUSED.check("fused", fused)
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            process_group = _group_of(module, process_group)
            module = module.module
        self.process_group = process_group
        self._named = list(module.named_parameters())
        if len(self._named) > _MOST:
            raise ValueError(f"the module has {len(self._named)} parameters, calibrated_hook numbers at most {_MOST}")
        self._set_options(
            seed=seed,
            clip=clip,
            block=block,
            skip_below=skip_below,
            skip=skip,
            compact=compact,
            error_feedback=error_feedback,
        )
        self.step = 0
        self.bytes_sent = 0
        self.bytes_plain = 0
        self._fused = fused
        self._residuals = Residuals()
        self._begin()

    def _begin(self) -> None:
        self._numbers = {id(param): k for k, (_, param) in enumerate(self._named)}
        self._agreed = False
        self._own_group: dist.ProcessGroup | None = None  # for the thread below, of the same ranks
        self._thread = WorkerThread()
        self._stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the default group, as that of the DistributedDataParallel that is copied with its hooks."""
        options = ("_named", "_fused", "_residuals", *_SAVED)
        return {"process_group": None, **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**_NOT_IN_EARLIER_VERSIONS, "_residuals": Residuals(), **state})
        self._begin()

    def _set_options(self, **options: Any) -> None:
        self.__dict__.update(_checked_options([name for name, _ in self._named], **options))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values; a checkpoint of rank 0 serves all ranks.

        With ``error_feedback`` there are tensors as well, which only their own rank goes on with, so each rank should
        save its own: a rank that loads another's begins without a residual.
        """
        return {**{name: getattr(self, name) for name in _SAVED}, "residuals": self._residuals.saved()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint, with its options. Every rank must call it: they compare again at the next step.

        With the world size of the checkpoint the bits are those of a training without the break; with another one, the
        ranks and their draws are others, and the estimates are unbiased as ever.

        Raises:
            ValueError, TypeError: an entry is missing or out of range, or does not fit the module; the message names
                it, and nothing was changed.
        """
        state = {**_NOT_IN_EARLIER_VERSIONS, "residuals": None, **state}
        missing = [name for name in _SAVED if name not in state]
        if missing:
            raise ValueError(f"the loaded state has no entry {missing[0]!r}; is it that of a CalibratedHookState?")
        counts = {name: _checked_integer(name, state[name]) for name in _COUNTS}
        residuals = Residuals.loaded(state["residuals"], {name: param.numel() for name, param in self._named})
        self._set_options(**{name: state[name] for name in _OPTIONS})
        self.__dict__.update(counts)
        self._residuals = residuals
        self._agreed = False

    def _check_agreement(self) -> None:
        """At the first bucket of the first step, before anything whose size depends on the parameters is sent."""
        options = {name: getattr(self, name) for name in (*_OPTIONS, "step")}
        trained = [(name, param) for name, param in self._named if param.requires_grad]
        agree({**options, "the number of parameters": len(trained), **parameter_list(trained)}, [self.process_group])
        world_size = dist.get_world_size(self.process_group)
        for name, param in trained:
            if self._is_skipped(name, param.numel()):
                continue
            if param.dtype not in SIGNIFICANT_BITS:
                raise TypeError(
                    f"{name} is {described(param)}; calibrated_hook codes gradients in float32, bfloat16 and float16: "
                    "name it in skip"
                )
            if world_size > min(most_ranks(param.dtype), _MOST):
                raise ValueError(
                    f"{name} is {described(param)}, whose sums over {world_size} ranks are not exact: at most "
                    f"{min(most_ranks(param.dtype), _MOST)} ranks can exchange codes of it; name it in skip"
                )
        self._agreed = True

    def _is_skipped(self, name: str, numel: int) -> bool:
        return numel < self.skip_below or name in self.skip

    def _exchange_of(self, bucket: dist.GradBucket) -> Callable[[dist.ProcessGroup | None], torch.Tensor]:  # type: ignore[name-defined]
        """Checks a bucket; returns what replaces its gradients by estimates of their means, over a process group."""
        coded: list[torch.Tensor] = []
        indices: list[int] = []
        plain: list[torch.Tensor] = []
        buffer: torch.Tensor = bucket.buffer()
        begin = 0
        if buffer.layout is not torch.strided:
            raise TypeError(f"a gradient is sparse ({buffer.layout}), calibrated_hook needs dense ones")
        coding = choose_coding(buffer.device, self._fused)
        for param in bucket.parameters():
            number = self._numbers.get(id(param))
            if number is None:
                raise ValueError(f"a parameter of {described(param)} is not one of the module the state was made with")
            grad = buffer[begin : begin + param.numel()]  # in the parameter's memory order
            begin += param.numel()
            if self._is_skipped(self._named[number][0], param.numel()):
                plain.append(grad)
            elif param.numel():
                coded.append(grad)
                indices.append(number)
        names = ("seed", "step", "clip", "block", "compact")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.error_feedback:
            place = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
            each = zip(indices, coded, strict=True)
            options["residuals"] = [self._residuals.of(self._named[k][0], grad, place) for k, grad in each]
        self.step += int(bucket.is_last())

        @torch.no_grad()
        def exchange(group: dist.ProcessGroup | None) -> torch.Tensor:
            wire = Wire(group)
            if plain:
                average_plainly(wire, plain)
            if coded:
                average_as_codes(wire, coding, coded, indices, **options)
            self.bytes_sent += wire.bytes_sent
            self.bytes_plain += ring_bytes(buffer.numel(), 4, wire.world_size)
            return buffer

        return exchange

    def _start(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        """Exchanges a bucket beside the backward pass, where that can be done in the same order on all ranks."""
        if not self._agreed:
            self._check_agreement()
        exchange, buffer = self._exchange_of(bucket), bucket.buffer()
        if buffer.is_cuda:
            return self._start_on_stream(exchange, buffer)
        if buffer.device.type != "cpu" or "cpu:gloo" not in dist.get_backend_config(self.process_group):
            return _completed(exchange(self.process_group))
        if self._own_group is None:
            self._own_group = private_gloo_group(self.process_group)
        return self._thread.submit(functools.partial(exchange, self._own_group))

    def _start_on_stream(
        self, exchange: Callable[[dist.ProcessGroup | None], torch.Tensor], buffer: torch.Tensor
    ) -> torch.futures.Future[torch.Tensor]:
        """Launches all at once, from backward's own thread, on a stream beside that of the backward pass."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(buffer.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream):
            return _completed(exchange(self.process_group))


def _group_of(
    model: torch.nn.parallel.DistributedDataParallel, given: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    if given is None:
        return None if model.process_group is dist.group.WORLD else model.process_group
    own, others = (dist.get_process_group_ranks(group) for group in (model.process_group, given))
    if own != others:
        raise ValueError(f"process_group has the ranks {others}, but the DistributedDataParallel has {own}")
    return given


def _completed(buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
        devices=[buffer.device] if buffer.is_cuda else None
    )
    future.set_result(buffer)
    return future


def _checked_integer(name: str, value: Any, least: int = 0, below: int = 2**63) -> int:
    """Raises TypeError or ValueError, naming the option, for what is no integer between these."""
    INTEGER.check(name, value)
    number = operator.index(value)
    if not least <= number < below:
        raise ValueError(f"{name} must be in {least} ... 2^{below.bit_length() - 1}-1, got {value}")
    return number


def _checked_options(
    known_names: Collection[str],
    *,
    seed: Any,
    clip: Any,
    block: Any,
    skip_below: Any,
    skip: Any,
    compact: Any,
    error_feedback: Any,
) -> dict[str, Any]:
    """The options of ``CalibratedHookState`` for a module with parameters of these names.

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.
    """
    NUMBER.described("a finite number > 0").or_none().check("clip", clip)
    INTEGER.or_none().check("block", block)
    if clip is not None and not 0 < float(clip) < math.inf:
        raise ValueError(f"clip must be None or a finite number > 0, got {clip!r}")
    FLAG.check("compact", compact)
    FLAG.check("error_feedback", error_feedback)
    _NAMES.check("skip", skip)
    skip = list(skip)
    for name in skip:
        TEXT.described("a list of parameter names").check("skip", name)
    skipped = sorted(set(skip))
    unknown = [name for name in skipped if name not in known_names]
    if unknown:
        raise ValueError(f"skip names {unknown[0]!r}, which is not a parameter of the module")
    return {
        "seed": _checked_integer("seed", seed, 0, 2**64),
        "clip": None if clip is None else float(clip),
        "block": None if block is None else _checked_integer("block", block, 1),
        "skip_below": _checked_integer("skip_below", skip_below),
        "skip": skipped,
        "compact": bool(compact),
        "error_feedback": bool(error_feedback),
    }


@torch.no_grad()
def calibrated_hook(
    state: CalibratedHookState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch defines it where it was built with c10d
) -> torch.futures.Future[torch.Tensor]:
    """Averages gradients over the ranks in a few bits per coordinate; for ``DistributedDataParallel``.

    Every rank replaces each coordinate g of a parameter's gradient by -T, 0 or T, with mean g exactly, for a bound T
    that all ranks share; what travels is the codes -1, 0, +1 and their sums. The result is T times the mean code, the
    same bits on every rank, and does not depend on the buckets. With ``clip`` some coordinates travel as they are,
    and their mean is rounded to the gradient's dtype; with ``error_feedback`` the mean over many steps is that of g,
    and not that of one. Where a gradient is not finite on some rank, all of that parameter's gradient becomes NaN or
    Inf, on all ranks, so a GradScaler skips the step.

    ::

        model = DistributedDataParallel(model)
        state = CalibratedHookState(model, seed=0)
        model.register_comm_hook(state, calibrated_hook)

    Args:
        state: of this model.
        bucket: gradients in float32, bfloat16 or float16.

    Returns:
        A future of the bucket's buffer, whose exchange goes on beside the backward pass. On CPUs, over gloo, it does so
        in a thread and a process group of the state's own, on GPUs in a stream.

    Raises:
        ValueError, TypeError: at the first step: the ranks disagree, or a parameter cannot be coded; the message names
            the difference or the parameter.

    Source: docs/exchange.md.
    """
    return state._start(bucket)
