# SPDX-License-Identifier: Apache-2.0
"""One list of tensors, stepped by all peers in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tools.machine import OtherProcesses

from .gradients import Quantiles
from .lists import Shape, numel
from .peers import BASELINES, MOMENTUM, PEERS, NotAvailable, Peer
from .progress import bar
from .timing import interleave, make_timer

# Numbers that a dense step reads and writes for each parameter: it reads g, m, theta and writes m, theta. AdamW has one
# more buffer.
DENSE_FLOOR = {"sgd": 5, "adamw": 7}
STATE = {"sgd": 2, "adamw": 3}  # tensors of a list's size that a peer has of its own
COPY, IN_PLACE = "copy", "in place"
_QUICK_MS = 1.0  # a list whose baseline takes less is given ten times the rounds
_SLOW_MS = 100.0  # a step that takes longer is neither profiled (thousands of launches) nor repeated for host_us
_MEMORY_SHARE = 0.8  # of what is free: the rest is for temporaries


@dataclass(frozen=True)
class Settings:
    """How a list is measured. copy_bytes: of each of the two buffers of the copy; budget_s: per peer and list."""

    device: torch.device
    dtype: torch.dtype
    repeat: int
    copy_bytes: int
    budget_s: float = 8.0


@dataclass
class Entrant:
    """A peer with tensors of its own. params and momentum are its own; gradients are shared, nobody writes them."""

    peer: Peer
    optimizer: object
    step_ms: float
    figures: dict = field(default_factory=dict)

    def density(self) -> float | None:
        """Share of all coordinates that moved in the last step; None where the peer does not tell."""
        return self.optimizer.overall_density() if hasattr(self.optimizer, "overall_density") else None


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def batches(peers: list[Peer], nbytes: int, free: int | None, fixed: int) -> list[list[Peer]] | None:
    """Who is measured with whom: all at once if memory allows, else each with the baseline; None if not even that.

    Args:
        nbytes: of all parameters of the list; an entrant needs twice as much, with AdamW three times.
        fixed: bytes needed in any case, beside the gradients.
    """

    def fits(entrants: int) -> bool:
        return free is None or nbytes * (STATE[peers[0].family] * entrants + 1) + fixed <= _MEMORY_SHARE * free

    if fits(len(peers)):
        return [peers]
    if not fits(2):
        return None
    baseline = BASELINES[peers[0].family]
    return [[PEERS[baseline], other] for other in peers if other.name != baseline]


class _OneEach:
    """An optimizer for each tensor, as one."""

    def __init__(self, peer: Peer, params: list[Tensor], grads: list[Tensor]):
        self._optimizers = [peer.make([param], [grad]) for param, grad in zip(params, grads, strict=True)]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


class ListRun:
    """Measures one list; ``rows`` maps a peer's name to its figures or to {"left_out": why}."""

    def __init__(self, label: str, shapes: list[Shape], peers: list[Peer], settings: Settings, one_each: bool = False):
        """``one_each``: an optimizer for each tensor."""
        self.label, self.shapes, self.peers, self.settings = label, shapes, peers, settings
        self.one_each = one_each
        self.family = peers[0].family
        self.baseline = BASELINES[self.family]
        self.rows: dict[str, dict] = {}
        self.notes: list[str] = []
        self.timer = make_timer(settings.device)
        self.generator = torch.Generator(settings.device).manual_seed(0)
        self.pass_ms: dict[str, list[float]] = {COPY: [], IN_PLACE: []}

    def run(self) -> dict:
        """Everything of the list as a plain dict."""
        elements, itemsize = numel(self.shapes), self.settings.dtype.itemsize
        free = free_bytes(self.settings.device)
        plan = batches(self.peers, elements * itemsize, free, 2 * self.settings.copy_bytes)
        result = {"tensors": len(self.shapes), "elements": elements, "notes": self.notes, "rows": self.rows}
        if plan is None:
            needed = (2 * STATE[self.family] + 1) * elements * itemsize
            self.notes.append(f"left out: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
            return result
        if len(plan) > 1:
            self.notes.append(
                f"not all peers fit into memory at once: each was interleaved with {PEERS[self.baseline].label} only"
            )
        grads = [Quantiles().draw(s.numel(), self.generator, self.settings.dtype).view(s) for s in self._sizes()]
        others = OtherProcesses()
        for batch in plan:
            self._batch(batch, grads)
        result["other_processes"] = others.share()
        for name, key in ((COPY, "copy_gb_s"), (IN_PLACE, "in_place_gb_s")):
            if self.pass_ms[name]:
                result[key] = 2 * self.settings.copy_bytes / statistics.median(self.pass_ms[name]) / 1e6
        for row in self.rows.values():
            if "ms" in row:
                row["gb_s"] = elements * DENSE_FLOOR[self.family] * itemsize / row["ms"] / 1e6
                row["share_of_copy"] = row["gb_s"] / result["copy_gb_s"]
        return result

    def _sizes(self) -> Iterable[torch.Size]:
        return map(torch.Size, self.shapes)

    def _batch(self, peers: list[Peer], grads: list[Tensor]) -> None:
        entrants = self._enter(peers, grads)
        if entrants:
            self._measure(entrants)
        entrants.clear()
        gc.collect()  # optimizers hold cycles

    def _enter(self, peers: list[Peer], grads: list[Tensor]) -> list[Entrant]:
        entrants = []
        for peer in peers:
            try:
                entrants.append(self._entrant(peer, grads))
            except NotAvailable as reason:
                self.rows[peer.name] = {"left_out": str(reason)}
            except Exception as error:  # another package's, or of a GPU: the others go on, and the report has it
                self.rows[peer.name] = {"left_out": f"failed: {_first_line(error)}"}
        return entrants

    def _entrant(self, peer: Peer, grads: list[Tensor]) -> Entrant:
        """Builds a peer and brings it into its steady state; with momentum every step then has d = g / (1 - mu)."""
        if peer.largest is not None and numel(self.shapes) > peer.largest:
            raise NotAvailable(f"takes part up to {peer.largest:,} elements only")
        params = []
        for grad in grads:
            values = torch.empty_like(grad).normal_(0, 0.02, generator=self.generator)
            params.append(torch.nn.Parameter(values))
            params[-1].grad = grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages, about precision
            optimizer = _OneEach(peer, params, grads) if self.one_each else peer.make(params, grads)
            self._first_step(optimizer, grads)
            step_ms = self.timer.prepare(optimizer.step)
            if step_ms < _SLOW_MS or peer.compiles:  # what is slow at first may have been compiled there
                step_ms = min(self.timer.prepare(optimizer.step) for _ in range(3))
        return Entrant(peer, optimizer, step_ms)

    def _first_step(self, optimizer: object, grads: list[Tensor]) -> None:
        """That of SGD makes the gradient the momentum buffer; AdamW has the same d in all steps with one gradient."""
        if self.family == "adamw":
            optimizer.step()
            return
        torch._foreach_mul_(grads, 1 / (1 - MOMENTUM))
        try:
            optimizer.step()
        finally:
            torch._foreach_mul_(grads, 1 - MOMENTUM)

    def _measure(self, entrants: list[Entrant]) -> None:
        rounds = self._rounds(entrants)
        samples = {e.peer.name: self._samples(e.step_ms, rounds) for e in entrants}
        samples[self.baseline] = rounds  # every other sample is compared with one of these
        calls = {e.peer.name: self._call(e) for e in entrants}
        passes = self._passes()
        for name, call in passes.items():
            ms = self.timer.prepare(call)
            calls[name] = lambda call=call, ms=ms: self.timer.sample(call, ms)
            samples[name] = self._samples(ms, min(rounds, max(self.settings.repeat, 5)))
        with bar(rounds, f"{self.label}, {len(entrants)} peers") as progress:
            measured = interleave(calls, samples, rounds, progress.update)
        for name in passes:
            self.pass_ms[name] += measured.pop(name).values()
        for entrant in entrants:
            self._add_row(entrant, measured)

    def _passes(self) -> dict[str, Callable[[], object]]:
        """Passes over large buffers that read and write copy_bytes each: how fast the memory is."""
        source = torch.ones(self.settings.copy_bytes // 4, dtype=torch.float32, device=self.settings.device)
        target = torch.zeros_like(source)
        return {COPY: lambda: target.copy_(source), IN_PLACE: source.neg_}

    def _rounds(self, entrants: list[Entrant]) -> int:
        return self.settings.repeat * (10 if min(e.step_ms for e in entrants) < _QUICK_MS else 1)

    def _samples(self, ms: float, rounds: int) -> int:
        """As many as the time allows, at least two (of few rounds: all)."""
        return min(rounds, max(2, int(self.settings.budget_s * 1e3 / max(ms, 1e-3))))

    def _call(self, entrant: Entrant) -> Callable[[], float]:
        step = entrant.optimizer.step
        slow = entrant.step_ms > _SLOW_MS
        figures = entrant.figures
        figures["host_us"] = self.timer.host_us(step, 1, 1) if slow else self.timer.host_us(step)
        figures["extra_mib"] = self.timer.extra_mib(step)
        figures["launches"] = None if slow else self.timer.launches(step)
        host_ms = entrant.step_ms if figures["host_us"] is None else figures["host_us"] / 1e3
        return lambda: self.timer.sample(step, host_ms)

    def _add_row(self, entrant: Entrant, measured: dict[str, dict[int, float]]) -> None:
        name = entrant.peer.name
        if name in self.rows:  # the baseline is measured once with each peer where memory is short
            return
        mine, base = measured[name], measured.get(self.baseline, {})
        row = {**entrant.figures, "ms": statistics.median(mine.values()), "density": entrant.density()}
        row["samples_ms"] = [round(value, 5) for value in mine.values()]
        ratios = [value / base[turn] for turn, value in mine.items() if turn in base]
        row["ratio"] = statistics.median(ratios) if ratios else None
        row["ratio_quartiles"] = quartiles(ratios)
        row["ms_quartiles"] = quartiles(list(mine.values()))
        row["version"] = entrant.peer.version()
        self.rows[name] = row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def quartiles(values: list[float]) -> list[float] | None:
    """Lower and upper quartile; None for fewer than two values."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
