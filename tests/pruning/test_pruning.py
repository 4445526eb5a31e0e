# SPDX-License-Identifier: Apache-2.0
"""CSGD with sparsity: when and how much is dropped, what stays zero, checkpoints, overflow, errors."""

import copy
import io

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from csgd_cuda import CSGD, hard_threshold_
from csgd_cuda.pruning.options import scheduled_sparsity

from ..helpers import BACKENDS, DTYPES, assert_same_bits, make_params, run_steps, set_grads

SHAPES = [(6, 8), (4, 8, 3, 3), (5,), (1, 4)]


def zeros(param):
    return int((param == 0).sum())


def steps_with_zeros(params, steps, **options):
    """The zeros of each parameter after each step."""
    optimizer = CSGD(params, **{"lr": 0.1, "momentum": 0.9, **options})
    counts = []
    for step in range(steps):
        set_grads(params, seed=step)
        optimizer.step()
        counts.append([zeros(param) for param in params])
    return optimizer, counts


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_prunes_to_the_same_bits(dtype):
    for options in (
        {"sparsity": 0.7}, {"sparsity": 0.5, "structure": "filter", "dropped_momentum": "clear"},
        {"sparsity": 0.5, "structure": "2:4", "regrow": False}, {"sparsity": 0.8, "threshold_scope": "group"},
        {"sparsity": 0.8, "regrow": False, "threshold_every": 2, "sparsity_schedule": ("cubic", 0, 6)},
    ):  # fmt: skip
        results = []
        for device, fused in BACKENDS:
            params = make_params(SHAPES, dtype, device)
            optimizer = run_steps(params, steps=5, fused=fused, **options)
            results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_same_bits(a, b, str(options))


def test_a_step_is_the_step_and_then_the_threshold(device, fused):
    params, others = make_params(SHAPES, torch.float32, device), make_params(SHAPES, torch.float32, device)
    optimizers = [CSGD(params, lr=0.1, sparsity=0.75, fused=fused), CSGD(others, lr=0.1, fused=fused)]
    for step in range(3):
        for tensors, optimizer in zip((params, others), optimizers, strict=True):
            set_grads(tensors, seed=step)
            optimizer.step()
        hard_threshold_([p.detach() for p in others if p.dim() >= 2], [12, 72, 1], fused=fused)
        for param, other in zip(params, others, strict=True):
            assert_same_bits(param, other)
    assert [zeros(p) for p in params] == [36, 216, 0, 3]


@pytest.mark.parametrize("scope", ["layer", "group"])
def test_a_parameter_that_makes_no_step_is_thresholded_with_the_others(scope):
    """Its gradient is None in some steps: all backends agree."""
    results = []
    for each, fused in BACKENDS:
        params = make_params(SHAPES, torch.float32, each)
        optimizer = CSGD(params, lr=0.1, momentum=0.9, sparsity=0.7, threshold_scope=scope, fused=fused)
        for step in range(4):
            set_grads(params, seed=step)
            if step in (0, 2):
                params[1].grad = None
            optimizer.step()
        results.append(params)
        if scope == "layer":
            assert [zeros(param) for param in params[:2]] == [34, 202]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("regrow", [True, False])
def test_gradients_are_left_as_they_are(regrow, device, fused):
    params = make_params(SHAPES, torch.float32, device)
    optimizer = CSGD(params, lr=0.1, momentum=0.9, sparsity=0.7, regrow=regrow, fused=fused)
    for step in range(3):
        set_grads(params, seed=step)
        before = [param.grad.clone() for param in params]
        optimizer.step()
        for param, grad in zip(params, before, strict=True):
            assert_same_bits(param.grad, grad)


OPTION_CHANGES = [
    {"sparsity": 0.0}, {"sparsity": 0.3}, {"regrow": False}, {"structure": "filter"}, {"threshold_scope": "group"},
    {"structure": "filter", "regrow": False}, {"threshold_every": 2}, {"sparsity_schedule": ("cubic", 3, 9)},
]  # fmt: skip


@pytest.mark.parametrize("start", [{"sparsity": 0.0}, {"sparsity": 0.6}, {"sparsity": 0.6, "regrow": False}], ids=str)
@pytest.mark.parametrize("change", OPTION_CHANGES, ids=str)
def test_plans_are_made_anew_where_pruning_changes(start, change, device, fused):
    """An option, a frozen parameter: the kept plan's step has the bits of a new one's."""
    results = []
    for keep in (True, False):
        params = make_params(SHAPES, torch.float32, device)
        optimizer = CSGD(params, lr=0.1, momentum=0.9, fused=fused, **start)
        for step in range(8):
            if step == 3:
                optimizer.param_groups[0].update(change)
                for state in optimizer.state.values():  # of another structure's shape
                    state.pop("mask", None)
            if step == 5:
                params[1].requires_grad_(False)
            set_grads(params, seed=step)
            if not keep:
                optimizer._plan = None
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


MASKS_GIVEN_UP = [  # options one after another, and the survivors of 144 weights at the end
    ([{"regrow": True}, {"regrow": False}], 72),
    ([{"sparsity": 0.0}, {"sparsity": 0.25}], 108),
    ([{"regrow": True, "structure": "filter"}, {"regrow": False, "structure": "element"}], 72),
]


@pytest.mark.parametrize(("changes", "survivors"), MASKS_GIVEN_UP, ids=str)
def test_what_may_come_back_is_not_dropped_by_an_old_mask(changes, survivors, device, fused):
    params = make_params([(12, 12)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, calibration=0, sparsity=0.5, regrow=False, fused=fused)  # all weights move
    for phase, change in enumerate([{}, *changes]):
        optimizer.param_groups[0].update(change)
        for step in range(4):
            set_grads(params, seed=10 * phase + step)
            optimizer.step()
    assert params[0].count_nonzero() == survivors


@pytest.mark.parametrize("ask", ["step", "threshold"])
def test_nothing_is_changed_where_a_parameter_without_a_gradient_cannot_be_thresholded(ask, device, fused):
    """It is thresholded with the others of its group, whose step comes first."""
    params = make_params([(4, 4), (6, 4)], torch.float32, device)
    optimizer = CSGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9, sparsity=0.5, fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    params[1].data, params[1].grad = params[1].data.to(torch.bfloat16), None
    set_grads(params[:1], seed=1)
    before = copy.deepcopy([params[0], optimizer.state_dict()])
    with pytest.raises(ValueError, match=r"parameter 1: momentum_buffer has .*float32.*expected .*bfloat16"):
        getattr(optimizer, ask)()
    assert_same_bits(params[0], before[0])
    assert str(optimizer.state_dict()) == str(before[1])


def test_sparsity_is_of_each_layer_or_of_the_group(device, fused):
    params = make_params(SHAPES, torch.float32, device)
    with torch.no_grad():
        params[0] *= 100  # of the group's, all of these survive
    _, counts = steps_with_zeros(params, 1, sparsity=0.5, fused=fused)
    assert counts == [[24, 144, 0, 2]]
    params = make_params(SHAPES, torch.float32, device)
    with torch.no_grad():
        params[0] *= 100
    _, ((first, second, vector, third),) = steps_with_zeros(
        params, 1, sparsity=0.5, threshold_scope="group", fused=fused
    )
    assert first <= 1
    assert vector == 0
    assert first + second + third == 170


def test_at_least_one_survives(device, fused):
    params = make_params([(1, 3), (2, 2, 2)], torch.float32, device)
    _, counts = steps_with_zeros(params, 2, sparsity=0.999, fused=fused)
    assert counts[-1] == [2, 7]


def test_the_ramp_is_cubic():
    group = {"sparsity": 0.8, "sparsity_schedule": ("cubic", 10, 30)}
    shares = [scheduled_sparsity(group, step) for step in (0, 10, 15, 20, 30, 1000)]
    assert shares == pytest.approx([0, 0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8, 0.8])


def test_thresholds_are_due_every_few_steps_along_the_ramp(device, fused):
    params = make_params([(10, 100)], torch.float32, device)
    _, counts = steps_with_zeros(
        params, 9, sparsity=0.9, sparsity_schedule=("cubic", 2, 6), threshold_every=2, regrow=False, fused=fused
    )
    at_4 = round(1000 * 0.9 * (1 - 0.5**3))
    assert [row[0] for row in counts] == [0, 0, 0, at_4, at_4, 900, 900, 900, 900]


def test_dropped_entries_come_back_or_stay_zero(device, fused):
    for regrow in (True, False):
        params = make_params([(10, 100)], torch.float32, device)
        optimizer, _ = steps_with_zeros(params, 1, sparsity=0.5, regrow=regrow, fused=fused)
        dropped = params[0] == 0
        for step in range(30):
            params[0].grad = torch.where(dropped, 1.0, 0.0)  # pushes what was dropped alone
            set_grads([], step)
            optimizer.step()
        assert zeros(params[0]) == 500
        assert torch.equal(params[0] == 0, dropped) != regrow


def test_gradients_of_what_is_dropped_for_good_do_not_raise_the_bound(device, fused):
    """A filter of zeros before batch normalization gets gradients 1 / sqrt(eps) times too large."""
    params = make_params([(10, 100)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, bound_decay=0.0, sparsity=0.5, structure="filter", regrow=False, fused=fused)
    for _ in range(2):
        dropped = params[0] == 0
        params[0].grad = torch.where(dropped, 1000.0, 0.5)
        optimizer.step()
    assert int(dropped.sum()) == 500
    assert torch.equal(params[0].grad == 1000, dropped)  # gradients are left as they are
    assert optimizer.lipschitz_bounds() == {0: 0.5}


@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
@pytest.mark.parametrize("regrow", [True, False])
def test_momentum_of_dropped_entries_is_kept_or_cleared(structure, regrow, device, fused):
    for choice in ("keep", "clear"):
        params = make_params([(8, 16)], torch.float32, device)
        optimizer = CSGD(
            params, lr=0.1, momentum=0.9, sparsity=0.5, structure=structure, regrow=regrow, dropped_momentum=choice,
            fused=fused,
        )  # fmt: skip
        for _ in range(3):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
        cleared = optimizer.state[params[0]]["momentum_buffer"] == 0
        assert torch.equal(cleared, (params[0] == 0) & (choice == "clear"))


def test_sparsity_can_begin_and_end_later(device, fused):
    params = make_params([(10, 100)], torch.float32, device)
    optimizer, counts = steps_with_zeros(params, 2, fused=fused)
    assert counts == [[0], [0]]
    seen = []
    for sparsity in (0.5, 0.9, 0.0):
        optimizer.param_groups[0]["sparsity"] = sparsity
        set_grads(params, seed=9)
        optimizer.step()
        seen.append(zeros(params[0]))
    assert seen[:2] == [500, 900]
    assert seen[2] < 900
    assert optimizer.param_groups[0]["threshold_step"] == 2


def test_threshold_makes_weights_sparse_between_steps(device, fused):
    params = make_params(SHAPES, torch.float32, device)
    optimizer, counts = steps_with_zeros(params, 3, sparsity=0.5, threshold_every=100, fused=fused)
    assert counts[-1] == [0, 0, 0, 0]
    optimizer.threshold()
    assert [zeros(p) for p in params] == [24, 144, 0, 2]
    assert optimizer.param_groups[0]["threshold_step"] == 3


@pytest.mark.parametrize("options", [
    {"regrow": False}, {"structure": "filter", "regrow": False}, {"structure": "2:4", "sparsity": 0.5, "regrow": False},
    {"sparsity_schedule": ("cubic", 1, 6), "threshold_every": 2}, {"dropped_momentum": "clear"},
    {"structure": "filter", "filter_dim": 1, "regrow": False},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_makes_the_bits_of_one_that_was_not(options, dtype, device, fused):
    if options.get("sparsity_schedule") and options.get("structure") == "2:4":
        pytest.skip("2:4 has no schedule")
    options = {"lr": 0.1, "momentum": 0.9, "sparsity": 0.75, "fused": fused, **options}
    params = make_params(SHAPES, dtype, device)
    optimizer = CSGD(params, **options)
    for step in range(8):
        if step == 3:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), params], file)
            file.seek(0)
            saved, saved_params = torch.load(file)
            resumed_params = [p.detach().clone().requires_grad_() for p in saved_params]
            resumed = CSGD(resumed_params, lr=0.5, fused=fused)
            resumed.load_state_dict(saved)
            again = resumed.state_dict()
            for key, state in saved["state"].items():
                for name, value in state.items():
                    assert again["state"][key][name].dtype == value.dtype
                    assert_same_bits(again["state"][key][name], value, name)
        set_grads(params, seed=step)
        optimizer.step()
        if step >= 3:
            set_grads(resumed_params, seed=step)
            resumed.step()
            for a, b in zip(params, resumed_params, strict=True):
                assert_same_bits(a, b, f"step {step}")


def test_copies_go_on_alike(device, fused):
    params = make_params(SHAPES, torch.float32, device)
    optimizer, _ = steps_with_zeros(params, 3, sparsity=0.5, regrow=False, fused=fused)
    twin_params, twin = copy.deepcopy((params, optimizer))
    for tensors, each in ((params, optimizer), (twin_params, twin)):
        set_grads(tensors, seed=5)
        each.step()
    for a, b in zip(params, twin_params, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("regrow", [True, False])
def test_an_overflow_step_changes_nothing(regrow, device, fused):
    params = make_params(SHAPES, torch.float32, device)
    optimizer, _ = steps_with_zeros(
        params, 1, sparsity=0.5, regrow=regrow, dropped_momentum="clear", threshold_every=3, fused=fused
    )
    before = [p.detach().clone() for p in params]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    optimizer.found_inf = torch.ones((), device=device)
    for step in range(2):
        set_grads(params, seed=step)
        optimizer.step()
    for param, old, buffer in zip(params, before, buffers, strict=True):
        assert_same_bits(param, old)
        assert_same_bits(optimizer.state[param]["momentum_buffer"], buffer)
        assert bool(optimizer.state[param].get("mask", torch.ones(())).all())


def test_without_sparsity_the_plan_is_kept_and_no_work_is_added(monkeypatch, device, fused):
    params = make_params(SHAPES, torch.float32, device)
    optimizer = run_steps(params, steps=3, fused=fused)
    monkeypatch.setattr("csgd_cuda.pruning.groups.Pruning._threshold_group", None)
    monkeypatch.setattr("csgd_cuda.pruning.groups.Pruning._check_groups", None)
    plan = optimizer._plan
    optimizer.step()
    assert optimizer._plan is plan


def test_counting_steps_does_not_make_the_options_be_read_again(monkeypatch, device, fused):
    params = make_params(SHAPES, torch.float32, device)
    optimizer = run_steps(params, steps=3, sparsity=0.5, threshold_every=1000, fused=fused)
    optimizer.param_groups[0]["threshold_step"] = 1000
    optimizer.step()
    monkeypatch.setattr("csgd_cuda.optim.plan.check_group", None)
    optimizer.step()
    assert optimizer.param_groups[0]["threshold_step"] == 1002


ERRORS = {
    "sparsity of 1": ({"sparsity": 1.0}, SHAPES, r"sparsity must be in \[0, 1\), got 1.0"),
    "below 0": ({"sparsity": -0.1}, SHAPES, r"sparsity must be in \[0, 1\), got -0.1"),
    "NaN": ({"sparsity": float("nan")}, SHAPES, r"sparsity must be in \[0, 1\), got nan"),
    "every": ({"threshold_every": 0}, SHAPES, "threshold_every must be 1 step or more, got 0"),
    "every half": ({"threshold_every": 0.5}, SHAPES, "threshold_every must be a whole number of steps, got 0.5"),
    "every None": ({"threshold_every": None}, SHAPES, "threshold_every must be a whole number of steps, got None"),
    "sparsity as text": ({"sparsity": "0.5"}, SHAPES, r"sparsity must be a number in \[0, 1\), got '0.5'"),
    "sparsity None": ({"sparsity": None}, SHAPES, r"sparsity must be a number in \[0, 1\), got None"),
    "schedule 5": ({"sparsity_schedule": 5}, SHAPES, "sparsity_schedule must be None or .*, got 5"),
    "schedule of text": ({"sparsity_schedule": ("cubic", "a", "b")}, SHAPES, "sparsity_schedule must be None or"),
    "regrow": ({"regrow": "no"}, SHAPES, "regrow must be True or False, got 'no'"),
    "structure": ({"structure": "row"}, SHAPES, "structure must be one of 'element', 'filter', '2:4', got 'row'"),
    "scope": ({"threshold_scope": "model"}, SHAPES, "threshold_scope must be one of 'layer', 'group', got 'model'"),
    "filter dimension": ({"filter_dim": 2}, SHAPES, "filter_dim must be 0 or 1, got 2"),
    "momentum": ({"dropped_momentum": "drop"}, SHAPES, "dropped_momentum must be one of"),
    "schedule": ({"sparsity_schedule": ("linear", 0, 5)}, SHAPES, "sparsity_schedule must be None or .'cubic'"),
    "endless": ({"sparsity_schedule": ("cubic", 0, float("inf"))}, SHAPES, "steps 0 <= begin < end"),
    "backwards": ({"sparsity_schedule": ("cubic", 5, 5)}, SHAPES, "steps 0 <= begin < end"),
    "2:4 of 80 %": ({"sparsity": 0.8, "structure": "2:4"}, SHAPES, "'2:4' has sparsity 0.5"),
    "2:4 of 6": ({"sparsity": 0.5, "structure": "2:4"}, [(4, 8), (4, 6)], "parameter 1 has shape .*divisible by 4"),
    "filter of vectors": ({"sparsity": 0.5, "structure": "filter"}, [(4,), (5,)], "parameters 0 ... 1 cannot"),
    "unknown": ({"sparsety": 0.5}, SHAPES, "unexpected keyword argument 'sparsety'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_option_or_the_parameter(case):
    options, shapes, message = ERRORS[case]
    params = make_params(shapes, torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        CSGD(params, lr=0.1, **options)
    if case == "unknown":
        return
    optimizer = CSGD(params, lr=0.1)  # as if a schedule had set it: the step says so, and changes nothing
    optimizer.param_groups[0].update(options)
    before = [p.detach().clone() for p in params]
    set_grads(params, seed=0)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old)
    assert not optimizer.state


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [
    {}, {"regrow": False}, {"threshold_scope": "group"}, {"momentum": 0.9}, {"momentum": 0.9, "regrow": False},
], ids=str)  # fmt: skip
def test_filters_of_transposed_convolutions_are_output_channels(groups, options, device, fused):
    """With filter_dim=1 the weight is pruned as its transpose is with 0, and output channels become constant."""
    torch.manual_seed(0)
    layer = torch.nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False, device=device)
    images = torch.randn(2, 4, 5, 5, device=device)
    transposed = layer.weight.detach().transpose(0, 1).clone(memory_format=torch.preserve_format).requires_grad_()
    options = {"lr": 0.1, "sparsity": 0.5, "structure": "filter", "fused": fused, **options}
    optimizers = CSGD([layer.weight], filter_dim=1, **options), CSGD([transposed], **options)
    for _ in range(3):
        optimizers[0].zero_grad()
        layer(images).square().mean().backward()
        transposed.grad = layer.weight.grad.transpose(0, 1)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(layer.weight.transpose(0, 1), transposed)
    dead = (layer(images) == 0).all(dim=3).all(dim=2).all(dim=0)
    assert dead.sum() == round(6 / groups * 0.5) * groups
    if not options.get("regrow", True):
        assert_same_bits(optimizers[0].state[layer.weight]["mask"], optimizers[1].state[transposed]["mask"])
        assert optimizers[0].state[layer.weight]["mask"].shape == (6 // groups,)


def test_masks_of_another_structure_are_refused(device, fused):
    params = make_params([(4, 8)], torch.float32, device)
    optimizer, _ = steps_with_zeros(params, 1, sparsity=0.5, regrow=False, fused=fused)
    optimizer.param_groups[0]["structure"] = "filter"
    before = params[0].detach().clone()
    with pytest.raises(
        ValueError, match=r"parameter 0: mask has shape \[4, 8\].* expected shape \[4\].* for structure"
    ):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_restore_masks_and_the_count(tmp_path, device, fused):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8).to(device)
        ramp = {"sparsity": 0.5, "sparsity_schedule": ("cubic", 1, 6), "threshold_every": 2, "regrow": False}
        return model, CSGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused, **ramp)

    model, optimizer = make()
    for step in range(8):
        if step == 4:
            saved = {"optimizer": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}
            checkpoint.save(saved, checkpoint_id=tmp_path)
            resumed, other = make()
            loaded = {"optimizer": get_optimizer_state_dict(resumed, other), "model": resumed.state_dict()}
            checkpoint.load(loaded, checkpoint_id=tmp_path)
            resumed.load_state_dict(loaded["model"])
            set_optimizer_state_dict(resumed, other, loaded["optimizer"])
            assert other.param_groups[0]["threshold_step"] == 4
            mask = other.state[resumed.weight]["mask"]
            assert mask.dtype == torch.bool
            assert int((~mask).sum()) == zeros(model.weight) > 0
        for each, steps in ((model, optimizer), *([(resumed, other)] if step >= 4 else [])):
            set_grads(list(each.parameters()), seed=step)
            steps.step()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_same_bits(a, b)
