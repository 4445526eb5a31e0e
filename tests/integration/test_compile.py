# SPDX-License-Identifier: Apache-2.0
"""torch.compile of a whole training step: one graph, not compiled again for another learning rate or step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from csgd_cuda import CSGD, CalibratedAdamW, calibrate_grad, hard_threshold_

from ..conftest import need_kernel
from ..helpers import TORCH_CLASS, assert_same_bits, assert_same_snapshots, make_params, set_grads, snapshot
from .helpers import OPTIONS, assert_same_training, loss_of, loss_went_down, make_data, make_model, make_optimizer


@pytest.fixture(autouse=True)
def fresh_compiler():
    need_kernel(torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def forward_backward_step(model, optimizer):
    """A training step as a function. Optimizer.zero_grad is not in it: torch itself refuses to trace it."""

    def step(x, y):
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        for param in model.parameters():
            param.grad = None
        return loss.detach()

    return step


def operator_calls(optimizer_class, counter):
    """The calls of the operator in each graph."""
    operator = f"csgd_cuda.{optimizer_class.direction.operator}"
    return [sum(operator in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]


def constant(optimizer, k):
    pass


def train_compiled(optimizer_class, data, *, make_lr=float, change_options=constant, backend="aot_eager", dynamic=None):
    """(model, optimizer, losses, number of compilations after each step)."""
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, lr=make_lr(OPTIONS[optimizer_class]["lr"]))
    counter = CompileCounterWithBackend(backend)
    # Without this torch breaks the graph at backward().
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step = torch.compile(forward_backward_step(model, optimizer), backend=counter, fullgraph=True, dynamic=dynamic)
        losses, compiled = [], []
        for k, (x, y) in enumerate(data):
            change_options(optimizer, k)
            losses.append(step(x, y).item())
            compiled.append(counter.frame_count)
    assert all(count <= 1 for count in operator_calls(optimizer_class, counter))
    return model, optimizer, losses, compiled


def train_eagerly(optimizer_class, data, *, make_lr=float, change_options=constant):
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, lr=make_lr(OPTIONS[optimizer_class]["lr"]))
    step = forward_backward_step(model, optimizer)
    for k, (x, y) in enumerate(data):
        change_options(optimizer, k)
        step(x, y)
    return model, optimizer


def rate(optimizer, k):
    return OPTIONS[type(optimizer)]["lr"] * 0.95**k


def new_number(optimizer, k):
    optimizer.param_groups[0]["lr"] = rate(optimizer, k)


def refill(optimizer, k):
    optimizer.param_groups[0]["lr"].fill_(rate(optimizer, k))


def same_until_3(optimizer, k):
    new_number(optimizer, max(k - 3, 0))


# The first step makes the state, and so is another graph than the later ones. A number that changes for the first
# time is compiled once more, as an input; dynamic=True says so from the start.
CASES = {
    "constant number": (float, constant, None, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
    "number changed by a scheduler": (float, same_until_3, None, [1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
    "number changed by a scheduler, dynamic": (float, new_number, True, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
    "tensor filled by a scheduler": (torch.tensor, refill, None, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_training_step_is_one_graph_and_is_not_compiled_again(case, optimizer_class):
    """fullgraph=True raises at a graph break. The bits are those of the same steps without a compiler."""
    make_lr, change_options, dynamic, expected = CASES[case]
    data, schedule = make_data(len(expected)), {"make_lr": make_lr, "change_options": change_options}
    model, optimizer, losses, compiled = train_compiled(optimizer_class, data, **schedule, dynamic=dynamic)
    # A graph may be traced twice for one compilation: what counts is when there were any.
    assert [b > a for a, b in zip([0, *compiled], compiled, strict=False)] == [
        b > a for a, b in zip([0, *expected], expected, strict=False)
    ]
    assert not counters["graph_break"]
    assert loss_went_down(losses)
    assert_same_training((model, optimizer), train_eagerly(optimizer_class, data, **schedule))


def test_step_beyond_2_24_is_not_compiled_again(optimizer_class):
    """The step is a tensor that the operator reads, not a number that the graph was made for."""
    data = make_data(6)

    def jump(optimizer, k):
        if k == 4:
            for state in optimizer.state.values():
                state["step"] += 2**24

    model, optimizer, _, compiled = train_compiled(optimizer_class, data, change_options=jump)
    assert compiled == [1, 2, 2, 2, 2, 2]
    assert_same_training((model, optimizer), train_eagerly(optimizer_class, data, change_options=jump))


def test_changed_momentum_is_compiled_again_and_not_ignored(optimizer_class):
    """Also what a scheduler changes of the betas: it puts a new tuple in place of the old one."""
    names = {CSGD: "momentum", CalibratedAdamW: "betas"}

    def change(optimizer, k):
        momentum = 0.9 - 0.1 * k
        optimizer.param_groups[0][names[optimizer_class]] = momentum if optimizer_class is CSGD else (momentum, 0.99)

    data = make_data(4)
    model, optimizer, _, compiled = train_compiled(optimizer_class, data, change_options=change)
    assert len(set(compiled)) == len(data)
    assert_same_training((model, optimizer), train_eagerly(optimizer_class, data, change_options=change))


def test_breaks_are_those_of_torch_where_the_loop_is_compiled_as_it_is(optimizer_class):
    """zero_grad and backward in the loop, no setting: the same breaks as with an optimizer that does nothing."""

    class Nothing(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    reasons = []
    for cls in (Nothing, optimizer_class):
        torch._dynamo.reset()
        counters.clear()
        model = make_model()
        optimizer = cls(model.parameters())
        counter = CompileCounterWithBackend("eager")

        @torch.compile(backend=counter)
        def step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            return loss

        for x, y in make_data(3):
            step(x, y)
        reasons.append({reason.splitlines()[0] for reason in counters["graph_break"]})
    assert reasons[0] == reasons[1]
    assert sum(operator_calls(optimizer_class, counter)) == 2  # once without state, once with


def test_scheduler_attached_to_the_optimizer_breaks_the_graph_as_with_torch(optimizer_class):
    """torch's schedulers wrap optimizer.step in a function that torch.compile skips; the model and the step are then
    graphs of their own. The bits are the same, and no learning rate is compiled anew (by torch's SGD each one is)."""
    data, reasons, options = make_data(8), [], OPTIONS[optimizer_class]
    for cls in (TORCH_CLASS[optimizer_class], optimizer_class):
        torch._dynamo.reset()
        counters.clear()
        model = make_model()
        optimizer = cls(model.parameters(), **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        counter = CompileCounterWithBackend("aot_eager")
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(forward_backward_step(model, optimizer), backend="eager", fullgraph=True)
            with pytest.raises(torch._dynamo.exc.Unsupported, match="marked as skipped"):
                whole(*data[0])
            step, compiled = torch.compile(forward_backward_step(model, optimizer), backend=counter), []
            for x, y in data:
                step(x, y)
                scheduler.step()
                compiled.append(counter.frame_count)
        reasons.append({reason.splitlines()[0] for reason in counters["graph_break"]})
    assert reasons[1] <= reasons[0]
    assert sum(operator_calls(optimizer_class, counter)) == 2  # without state, and with it
    assert len(set(compiled[2:])) == 1

    def by_hand(optimizer, k):
        optimizer.param_groups[0]["lr"] *= 0.95 if k else 1

    assert_same_training((model, optimizer), train_eagerly(optimizer_class, data, change_options=by_hand))


def test_reference_makes_the_bits_of_an_eager_step(optimizer_class):
    """fused=False, without a graph break."""
    results = []
    for compiled in (False, True):
        (param,) = make_params([(70,)], torch.float32)
        optimizer = optimizer_class([param], fused=False)
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True) if compiled else optimizer.step
        for k in range(3):
            set_grads([param], seed=k)
            step()
        results.append(snapshot([param], optimizer))
    assert_same_snapshots(*results)


def reference_calls(device):
    """Calls of the reference. Where it is compiled, a graph of the last has a sort, those of the others a ceil_."""
    param, grad = (torch.ones(8, 4, device=device) for _ in range(2))
    param.requires_grad_().grad = grad
    state = {name: torch.tensor(0, device=device) for name in ("index", "step")}
    return {
        "CSGD": CSGD([param], momentum=0.9, fused=False).step,
        "CalibratedAdamW": CalibratedAdamW([param], fused=False).step,
        "layer": lambda: calibrate_grad(grad, lipschitz=1.0, fused=False, **state),
        "threshold": lambda: hard_threshold_([param], [3], structure="filter", fused=False),
    }


@pytest.mark.parametrize("name", reference_calls("cpu"))
def test_reference_is_compiled_for_cpus_only(name):
    """On a GPU (here the device meta) compiled code would contract its products and sums."""
    found = {}
    for device in ("cpu", "meta"):
        counter = CompileCounterWithBackend("eager")
        torch.compile(reference_calls(device)[name], backend=counter)()
        nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
        found[device] = {"ceil_", "sort"} & {getattr(node.target, "__name__", node.target) for node in nodes}
        torch._dynamo.reset()
    assert found["cpu"]
    assert not found["meta"]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(reference_calls("meta")[name], backend="eager", fullgraph=True)()


def test_inductor_compiles_a_whole_training_step(optimizer_class):
    """Its products and sums of the model are not the eager ones to the last bit; the steps are counted alike."""
    data = make_data(12)
    model, optimizer, losses, _ = train_compiled(optimizer_class, data, change_options=new_number, backend="inductor")
    expected, other = train_eagerly(optimizer_class, data, change_options=new_number)
    assert loss_went_down(losses)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        assert int(optimizer.state[a]["step"]) == int(other.state[b]["step"]) == len(data)


@pytest.mark.parametrize(
    ("optimizer_class", "dtype"), [(CSGD, torch.float64), (CalibratedAdamW, torch.bfloat16)], ids=["CSGD", "AdamW"]
)
def test_inductor_makes_the_bits_of_an_eager_step(optimizer_class, dtype):
    """optimizer.step alone, by the default backend, under a schedule; the gradients are given."""
    results = []
    for compiled in (False, True):
        model = make_model(dtype)
        optimizer = make_optimizer(optimizer_class, model)
        step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        for k, (x, y) in enumerate(make_data(5, dtype=dtype)):
            new_number(optimizer, k)
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            step()
        results.append((model, optimizer))
    assert_same_training(*results)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(CSGD, {}), (CalibratedAdamW, {"regrow": False, "threshold_every": 2}), (CSGD, {"structure": "filter"})],
    ids=["CSGD", "AdamW, no regrowth", "CSGD, filters"],
)
def test_a_pruning_optimizer_steps_outside_the_graph(optimizer_class, options):
    """Its schedule counts in Python: traced, every step would be compiled anew. The bits are those without a compiler,
    and fullgraph=True raises an error."""
    results, data = [], make_data(12)
    for compiled in (False, True):
        model = make_model()
        optimizer = make_optimizer(optimizer_class, model, sparsity=0.5, sparsity_schedule=("cubic", 1, 8), **options)
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        frames = []
        for x, y in data:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            step()
            frames.append(counter.frame_count)
        results.append((model, optimizer))
        assert len(set(frames[2:])) == 1
    assert_same_training(*results)
    assert int((results[0][0][0].weight == 0).sum()) == 128
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_step_of_two_groups_is_one_graph_with_two_calls(optimizer_class):
    """The checks before the first of several calls are made when the graph is traced, and cost nothing in it."""
    results = []
    for compiled in (False, True):
        params = make_params([(70,), (3, 4)], torch.float32)
        optimizer = optimizer_class([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=0.1)
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(optimizer.step, backend=counter, fullgraph=True) if compiled else optimizer.step
        for k in range(3):
            set_grads(params, seed=k)
            step()
        assert operator_calls(optimizer_class, counter) == ([2, 2] if compiled else [])  # without state, and with it
        results.append(snapshot(params, optimizer))
    assert_same_snapshots(*results)


def test_compiled_optimizer_resumes(optimizer_class):
    """A state that was loaded is stepped by the compiled code, too."""
    data = make_data(8)
    model, optimizer, _, _ = train_compiled(optimizer_class, data[:4])
    second = make_optimizer(optimizer_class, model, lr=7.0)
    second.load_state_dict(optimizer.state_dict())
    step = torch.compile(second.step, backend="aot_eager", fullgraph=True)
    for x, y in data[4:]:
        second.zero_grad()
        loss_of(model, x, y).backward()
        step()
    assert_same_training((model, second), train_eagerly(optimizer_class, data))


def test_compiled_model_and_eager_optimizer():
    """The usual recipe: torch.compile of the model alone."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(CSGD, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x, y in data:
        optimizer.zero_grad()
        loss_of(compiled, x, y).backward()
        optimizer.step()
    expected = train_eagerly(CSGD, data)
    assert_same_training((model, optimizer), expected)
    for a, b in zip(compiled.parameters(), expected[0].parameters(), strict=True):
        assert_same_bits(a, b)
