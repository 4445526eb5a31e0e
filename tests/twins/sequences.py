# SPDX-License-Identifier: Apache-2.0
"""What happens to an optimizer in training and between, as rules that hypothesis makes sequences of."""

import copy
import io

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from csgd_cuda import CSGD, CalibratedAdamW, extension

from ..helpers import DTYPES, assert_same_snapshots
from . import drawn
from .drawn import kinds, layouts, one_of_its, seeds, some
from .guarded import LAYOUTS
from .machine import TwinMachine, change
from .mishaps import BAD_GROUPS, BAD_LOADS, MISHAPS
from .twin import assert_equal, assert_unchanged

# An entry of the state, or (None) all of it. The means of AdamW may be lost only together: mishaps.py.
MAY_BE_LOST = {CSGD: ["momentum_buffer", "lipschitz_bound", None], CalibratedAdamW: ["lipschitz_bound", None]}


class Sequences(TwinMachine):
    @change(kind=kinds, seed=seeds, layout=st.none() | layouts)
    def new_grads(self, kind, seed, layout):
        self.give_grads(range(len(self.params)), kind, seed, layout)

    @change(which=st.lists(some, min_size=1, max_size=4), kind=kinds, seed=seeds, layout=st.none() | layouts)
    def some_new_grads(self, which, kind, seed, layout):
        self.give_grads({k % len(self.params) for k in which}, kind, seed, layout)

    @change(which=st.lists(some, min_size=1, max_size=4), freeze=st.booleans())
    def grads_gone(self, which, freeze):
        """Frozen ones get no gradient before they are thawed."""
        for twin in self.twins:
            for k in {k % len(self.params) for k in which}:
                twin.params[k].grad = None
                if freeze:
                    twin.params[k].requires_grad_(False)

    @change(which=some)
    def freeze_with_gradient(self, which):
        for twin in self.twins:
            twin.params[which % len(self.params)].requires_grad_(False)

    @precondition(lambda self: not all(param.requires_grad for param in self.params))
    @change(which=st.none() | some, seed=seeds)
    def unfreeze(self, which, seed):
        frozen = [k for k, param in enumerate(self.params) if not param.requires_grad]
        thawed = frozen if which is None else [frozen[which % len(frozen)]]
        for twin in self.twins:
            for k in thawed:
                twin.params[k].requires_grad_()
        self.give_grads(thawed, "heavy", seed, "contiguous")

    @precondition(lambda self: len(self.params) < 7)
    @change(members=drawn.tensors, group=drawn.options, seed=seeds, with_grads=st.booleans())
    def add_group(self, members, group, seed, with_grads):
        first = len(self.params)
        self.add(members, group)
        if with_grads:
            self.give_grads(range(first, len(self.params)), "heavy", seed, "contiguous")

    @change(which=some, changes=st.lists(drawn.changes, min_size=1, max_size=4))
    def change_options(self, which, changes):
        for name, value in changes:
            self.set_option(which, name, value, invalid=False)

    @rule(which=some, option=drawn.bad_changes)
    def change_option_to_invalid(self, which, option):
        self.set_option(which, *option, invalid=True)

    def set_option(self, which, name, value, invalid):
        which = which % len(self.groups)
        before = [twin.opt.param_groups[which][name] for twin in self.twins]
        for twin in self.twins:
            twin.set_option(which, name, value)
        if invalid:
            if any(param.grad is not None for param in self.groups[which]["params"]):
                self.fails(lambda twin: twin.step(), self.twins)
                self.seen[f"invalid {name}"] += 1
            for twin, old in zip(self.twins, before, strict=True):
                twin.opt.param_groups[which][name] = old

    @change(which=some, first=st.sampled_from(drawn.FIRST_INDICES))
    def change_first_index(self, which, first):
        """Of one group; the ranges of all of them stay apart."""
        which = which % len(self.groups)
        first = None if first is None else first + which * drawn.INDICES_OF_A_GROUP
        self.set_option(which, "first_index", first, invalid=False)

    @change(which=some, dtype=st.sampled_from([torch.float32, torch.float16]), factor=st.sampled_from([0.5, 2]))
    def change_lr_tensor_in_place(self, which, dtype, factor):
        which = which % len(self.groups)
        if not isinstance(self.groups[which]["lr"], torch.Tensor):
            self.set_option(which, "lr", drawn.TensorOf(0.1, dtype), invalid=False)
            self.step()
        for twin in self.twins:
            lr = twin.opt.param_groups[which]["lr"]
            lr.copy_(lr * factor)

    @change(which=some, pruning=drawn.pruning)
    def prune(self, which, pruning):
        """For two steps, the first group from ``which`` on that has something to prune. The step after these forgets
        the masks."""

        def has_matrix(k):
            return any(param.dim() >= 2 and param.requires_grad for param in self.groups[k]["params"])

        count = len(self.groups)
        k = next((k % count for k in range(which, which + count) if has_matrix(k % count)), None)
        if k is None:
            return
        for options, steps in ((pruning, 2), ({"sparsity": 0.0}, 1)):
            for twin in self.twins:
                twin.opt.param_groups[k].update(options)
            for _ in range(steps):
                self.step()
                assert_equal(*self.twins)
        self.seen["pruned groups"] += 1

    @change(numbers=st.none() | st.sampled_from(drawn.SCALES))
    def scaler(self, numbers):
        for twin in self.twins:
            twin.set_scaler(*numbers or (None, None))

    @change(how=st.sampled_from(["as it is", "copy", "file"]), fresh=st.booleans(), turn=st.integers(0, 2))
    def save_and_load(self, how, fresh, turn):
        """Into the optimizer that saved it, or, as all are equal, into another; nothing but the density goes."""
        before = [twin.snapshot()[0] for twin in self.twins]
        saved = [twin.opt.state_dict() for twin in self.twins]
        files = copy.deepcopy(saved)
        for k, twin in enumerate(self.twins):
            twin.load(through(how, saved[(k + turn) % len(saved)]), fresh)
        for twin, tensors in zip(self.twins, before, strict=True):
            assert_same_snapshots(twin.tensors(), tensors)
        self.step(guarded=False)  # of which the checkpoint sees nothing: it shares no memory
        for state_dict, file in zip(saved, files, strict=True):
            assert_same_snapshots(state_tensors(state_dict), state_tensors(file))

    @change(turn=st.integers(0, 2))
    def copy_everything(self, turn):
        """The copies go on; the originals make a step of their own, which must not be seen."""
        originals = self.twins
        self.twins = copy.deepcopy(originals)
        before = [twin.snapshot() for twin in self.twins]
        originals[turn].step()
        for twin, tensors in zip(self.twins, before, strict=True):
            assert_unchanged(twin, tensors)

    @change(which=st.none() | some, dtype=st.sampled_from(DTYPES))
    def move_dtype(self, which, dtype):
        """A part of the model, or (None) all of it; load_state_dict() brings the state after it."""
        moved = range(len(self.params)) if which is None else [which % len(self.params)]
        layout = LAYOUTS[0 if which is None else which % len(LAYOUTS)]
        for twin in self.twins:
            expected = [twin.state_in(k, dtype if k in moved else param.dtype) for k, param in enumerate(twin.params)]
            for k in moved:
                twin.set_data(k, twin.params[k].detach().to(dtype), layout)
            twin.load(copy.deepcopy(twin.opt.state_dict()), fresh=False)
            for k, state in enumerate(expected):
                assert_same_snapshots(twin.state_in(k, twin.params[k].dtype), state)
            twin.guard_state()

    @change(which=some, layout=layouts, seed=st.none() | seeds)
    def move_layout(self, which, layout, seed):
        """The state stays as it lies. With a seed the values are new: whatever was NaN is no longer."""
        k = which % len(self.params)
        for twin in self.twins:
            values = twin.params[k].detach().clone()
            if seed is not None:
                values = drawn.make_values("heavy", values.shape, values.dtype, seed)
            twin.set_data(k, values, layout)

    @change(which=some, entry=one_of_its(MAY_BE_LOST))
    def lose_state(self, which, entry):
        """Of one parameter."""
        for twin in self.twins:
            state = twin.opt.state.get(twin.params[which % len(self.params)], {})
            if entry is None:
                state.clear()
            else:
                state.pop(entry, None)

    @change(first_threads=st.integers(0, 2), isa=st.sampled_from(["baseline", "avx2", "avx512"]))
    def machine(self, first_threads, isa):
        self.first_threads = first_threads
        if not extension._C.set_cpu_isa(isa):
            note(f"no {isa} here")

    @rule(which=some, mishap=one_of_its(MISHAPS))
    def mishap(self, which, mishap):
        """The mishap happens to the first parameter from ``which`` on to which it can. Not in the twin that loads its
        state, and so mends it."""
        count, twins = len(self.params), self.twins[:2]
        places = (k % count for k in range(which, which + count))
        k = next((k for k in places if mishap.can_happen(twins[0], k)), None)
        if k is not None:
            self.fails(lambda twin: mishap.step(twin, k), twins)
            self.seen["mishaps"] += 1
            self.seen[mishap.name] += 1

    @rule(options=one_of_its(BAD_GROUPS), new=st.booleans())
    def bad_group(self, options, new):
        """One with wrong options, or one with a parameter that is there already."""

        def add(twin):
            group = {"params": [torch.ones(3)], **options} if new else {"params": twin.params[:1]}
            twin.opt.add_param_group(group)

        self.fails(add, self.twins)
        self.seen["bad group" if new else "parameter in two groups"] += 1
        assert len({len(twin.opt.param_groups) for twin in self.twins}) == 1

    @rule(spoil=one_of_its(BAD_LOADS))
    def bad_load(self, spoil):
        def load(twin):
            state_dict = copy.deepcopy(twin.opt.state_dict())
            spoil(state_dict, twin.opt.direction)
            twin.opt.load_state_dict(state_dict)

        self.fails(load, self.twins)
        self.seen["bad load"] += 1
        self.seen[spoil.__name__] += 1


def state_tensors(state_dict):
    return [(f"{name} {k}", t) for k, state in state_dict["state"].items() for name, t in state.items()]


def through(how, state_dict):
    if how == "copy":
        return copy.deepcopy(state_dict)
    if how == "file":
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    return state_dict
