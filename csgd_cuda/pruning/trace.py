# SPDX-License-Identifier: Apache-2.0
"""The operations of a model's forward pass, as graphs of torch.fx, and what the graphs cannot show."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..layers.convert import has_layer, plain_class
from ..layers.filters import GCConv2d, GCLinear
from .channels import NORMS
from .regions import WEIGHTED

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_modules(model: nn.Module) -> None:
    """Raises TypeError, naming the module, where a module may compute something else than its class says."""
    for path, module in model.named_modules():
        name = path or "the model"
        _check_wrapper(module, name)
        if parametrize.is_parametrized(module):
            tensors = ", ".join(module.parametrizations)
            raise TypeError(
                f"{name} has a parametrization of {tensors}, which export_pruned does not support; take it off with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if isinstance(module, LazyModuleMixin):
            raise TypeError(f"{name} is a {type(module).__name__} that has not seen its input yet; call the model once")
        for hooks in _HOOKS:
            if getattr(module, hooks, None):
                raise TypeError(
                    f"{name} has hooks in {hooks}, which may change what it computes; remove them first (those of "
                    "torch.nn.utils.prune with prune.remove, of an older weight_norm with remove_weight_norm)"
                )
        if isinstance(module, (GCConv2d, GCLinear)) or has_layer(module, "branches"):
            raise TypeError(
                f"{name} is a {plain_class(module).__name__} with branches of filters; give export_pruned the model "
                "that csgd_cuda.fold makes of this one"
            )
        _check_attributes(module, name, is_root=not path)
        if plain_class(module) in (*WEIGHTED, *NORMS):
            _check_tensors(module, name)


def _check_wrapper(module: nn.Module, name: str) -> None:
    """Raises TypeError for what runs another module, which is the one to export."""
    if "_orig_mod" in module._modules:
        raise TypeError(f"{name} is compiled; give export_pruned what was compiled, and compile the smaller model")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{name} is a ScriptModule; give export_pruned what was scripted, and script the smaller model")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"{name} is a {type(module).__name__}; give export_pruned its .module")


def _check_attributes(module: nn.Module, name: str, is_root: bool) -> None:
    kind = plain_class(module)
    followed = not (is_root or kind.__module__.startswith("torch.nn"))  # so that its methods may be any
    for key, value in vars(module).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise TypeError(
                f"{name} has a tensor {key} that waits for a backward pass and cannot be copied; delete it, or keep "
                f"module.{key}.detach() in its place"
            )
        if not followed and callable(value) and callable(getattr(type(module), key, None)):
            raise TypeError(
                f"{name} has a {key} of its own in place of that of {kind.__name__}, which may compute something else; "
                f"delete it (del module.{key})"
            )


def _check_tensors(layer: nn.Module, name: str) -> None:
    for key in ("weight", "bias"):
        tensor = getattr(layer, key, None)
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            raise TypeError(f"{name}: export_pruned needs a {key} that is a Parameter, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError(
                f"{name}: export_pruned needs a {key} of floating point, dense and with values, got {tensor.dtype}, "
                f"{tensor.layout} on {tensor.device}"
            )


class Traces:
    """The graphs of a model's forward pass in eval mode and in training mode.

    A submodule whose forward torch.fx cannot follow is a single node, ``opaque``, of which nothing is known.

    Raises:
        TypeError: torch.fx cannot follow the model's own forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.opaque: set[str] = set()
        while True:
            failed = self._trace(model)
            if failed is None:
                return
            self.opaque.add(failed)

    def _trace(self, model: nn.Module) -> str | None:
        """Makes the graphs, or gives the name of the submodule that has to become opaque."""
        # A forward may change buffers and attributes while it is followed, but a parameter only by an operation of the
        # graph. So the parameters need not be copied.
        shared = {id(parameter): parameter for parameter in model.parameters()}
        followed = copy.deepcopy(model, shared)
        graphs = []
        for mode in (False, True):
            followed.train(mode)
            tracer = _Tracer(self.opaque)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of arguments whose values torch.fx cannot check in the graph
                    graphs.append(tracer.trace(followed, _defaults(followed)))
            except Exception as error:
                if tracer.failed is not None:
                    return tracer.failed
                raise TypeError(
                    f"export_pruned cannot follow the forward of the model, {type(model).__name__}: torch.fx says "
                    f"{error}. Put what depends on the values or shapes of tensors into a module of its own, whose "
                    "channels then stay"
                ) from error
        self.evaluation, self.training = graphs
        self._root = followed
        return None

    def uses(self, model: nn.Module) -> Counter[str]:
        """How often each module is called, by name; more than once also for one that something else may see.

        Something else: a module that is a single node and holds it, an operation that takes its parameters, or a module
        that has one of these, too.
        """
        calls, taken = Counter[str](), set()
        for graph in (self.evaluation, self.training):
            calls |= Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
            taken |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        held = {id(inner) for name in calls for inner in list(model.get_submodule(name).modules())[1:]}
        owners = Counter(id(tensor) for module in model.modules() for tensor in _tensors(module))
        for name, module in model.named_modules():
            if id(module) in held or name in taken or any(owners[id(tensor)] > 1 for tensor in _tensors(module)):
                calls[name] += 2
        return calls

    def signature(self) -> list[tuple[str, ...]]:
        """All nodes as texts, the values of constants among them."""
        return [
            (node.op, str(node.target), str(node.args), str(node.kwargs), self._constant(node))
            for graph in (self.evaluation, self.training)
            for node in graph.nodes
        ]

    def _constant(self, node: fx.Node) -> str:
        if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
            return ""
        return str(getattr(self._root, str(node.target)).tolist())


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments of a forward that need not be given."""
    arguments = inspect.signature(type(model).forward).parameters
    return {name: a.default for name, a in arguments.items() if a.default is not inspect.Parameter.empty}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


class _Tensor(fx.Proxy):
    """Takes the place of a tensor in a forward that is followed, also where that distinguishes tensors from others."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor


class _Tracer(fx.Tracer):
    """Notes the innermost module in whose forward an error was raised."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self._opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._opaque or isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m not in (self.submodule_paths or ()):  # made in the forward itself
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            name = self.path_of_module(m)
            if self.failed is None and not self.is_leaf_module(m, name):
                self.failed = name
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        counts = node.target in (getattr, "size", "dim")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            counts = node.args[0].target in (getattr, "size")
        return fx.Proxy(node, self) if counts else _Tensor(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Tensor else super().create_arg(a)
