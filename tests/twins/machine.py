# SPDX-License-Identifier: Apache-2.0
"""Three twins that live through the same: how they start, step, get gradients and are compared."""

from collections import Counter

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from csgd_cuda import extension

from . import drawn
from .twin import Twin, assert_equal, assert_skipped, assert_unchanged

RULES = []
STEPS = st.sampled_from(["step", "step", "step", "overflow"])


def change(**strategies):
    """A rule that changes something and then makes ``steps``, some of which overflow."""

    def decorate(function):
        def run(self, steps, **arguments):
            function(self, **arguments)
            self.seen[function.__name__] += 1
            for kind in steps:
                self.step(overflow=kind == "overflow")

        run.__name__ = function.__name__
        RULES.append(function.__name__)
        return rule(steps=st.lists(STEPS, max_size=3), **strategies)(run)

    return decorate


class TwinMachine(RuleBasedStateMachine):
    seen = Counter()  # what all sequences together have done

    @initialize(start=drawn.starts, seed=drawn.seeds)
    def start(self, start, seed):
        self.optimizer_class, groups = start
        self.threads, self.usual_isa = torch.get_num_threads(), extension.build_info()["cpu_isa"]
        self.first_threads = 1
        habits = [(True, "kept"), (False, "new plan"), (True, "reborn")]
        self.twins = [Twin(self.optimizer_class, fused, habit) for fused, habit in habits]
        for members, group in groups:
            self.add(members, group)
        self.give_grads(range(len(self.params)), "heavy", seed, None)
        self.seen[f"sequences of {self.optimizer_class.__name__}"] += 1

    def teardown(self):
        if hasattr(self, "threads"):
            torch.set_num_threads(self.threads)
            extension._C.set_cpu_isa(self.usual_isa)

    @property
    def params(self):
        return self.twins[0].params

    @property
    def groups(self):
        return self.twins[0].opt.param_groups

    def add(self, members, group):
        made = [(drawn.make_values("heavy", shape, dtype, seed), layout) for shape, layout, dtype, seed in members]
        for twin in self.twins:
            twin.add_group(made, group)

    def give_grads(self, which, kind, seed, layout):
        """``layout``: None changes gradients in place where there are any."""
        for k in which:
            if self.params[k].requires_grad:
                values = drawn.make_values(kind, self.params[k].shape, self.params[k].dtype, seed + k)
                for twin in self.twins:
                    if layout is None and twin.params[k].grad is not None:
                        twin.params[k].grad.copy_(values)
                    else:
                        twin.set_grad(k, values, layout or "contiguous")

    def step(self, guarded=True, overflow=False):
        for k, twin in enumerate(self.twins):
            torch.set_num_threads(1 + (self.first_threads + k) % 3)
            scaler = dict(twin.scaler)
            if overflow:
                twin.set_scaler(None, 1.0)
            before = twin.snapshot() if twin.overflows() else None
            twin.step(guarded)
            if before is not None:
                assert_skipped(twin, before)
            twin.scaler = scaler
        self.seen["overflows"] += before is not None
        self.seen["steps"] += 1
        self.seen["steps that moved something"] += any(share > 0 for share in self.twins[0].opt.density().values())

    @invariant()
    def twins_are_equal(self):
        if hasattr(self, "twins"):
            for twin in self.twins:
                twin.check_guards()
            assert_equal(*self.twins)

    def fails(self, action, twins):
        """``action(twin)`` raises the same for all of these twins, and changes nothing."""
        self.seen["errors"] += 1
        raised = []
        for twin in twins:
            before = twin.snapshot()
            with pytest.raises((ValueError, TypeError)) as error:
                action(twin)
            raised.append(error.type)
            assert_unchanged(twin, before)
        assert len(set(raised)) == 1, raised
