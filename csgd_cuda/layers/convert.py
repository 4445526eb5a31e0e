# SPDX-License-Identifier: Apache-2.0
"""``calibrate`` puts gradient calibration layers into an existing model, ``uncalibrate`` takes them out again."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..kinds import FLAG, MODULE, TEXT
from .module import GradientCalibration
from .numbered import NumberedLayer

# The names of the layers in the module whose weight or outputs they get, and of their state in a state dict's metadata.
LAYER_NAMES = {"weight": "weight_calibration", "output": "output_calibration"}
BRANCHES = "filter_branches"  # that of branches.py, which gets the weight after weight_calibration
_NAMES = {"weight": LAYER_NAMES["weight"], "branches": BRANCHES, "output": LAYER_NAMES["output"]}
_STATE = "csgd_cuda.calibration"
_HANDLES = "_csgd_cuda_handles"  # of the hooks of a calibrated module
_SAVED = ("step", "lipschitz_bound")  # not the index, which is a layer's place in this very model


def calibrate(
    model: nn.Module,
    types: type[nn.Module] | Iterable[type[nn.Module]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    where: Literal["weight", "output"] = "weight",
    *,
    calibration: float = 0.05,
    lipschitz: float | None = None,
    bound_decay: float = 0.99,
    seed: int = 0,
    per_channel: bool = False,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    fused: bool | None = None,
) -> nn.Module:
    """Adds a ``GradientCalibration`` to every module of the given types, in place; returns the model.

    The parameters stay the same objects, with their names and in their order, so that optimizers and their checkpoints
    are interchangeable with those of the plain model. So are state dicts: they have the plain model's keys, and the
    layers' state travels in the metadata, which torch.save keeps.

    Args:
        model: any module; what is calibrated already stays as it is.
        types: the modules to calibrate. The projections of nn.MultiheadAttention are left out: no module of their own
            is called for them.
        where: "weight" calibrates the gradients of the weights, "output" those of the modules' outputs, and so all
            gradients further down.
        per_channel: a bound for each output channel instead of one for the tensor (for each channel of its group, in
            the weight of a transposed convolution with groups).
        calibration, lipschitz, bound_decay, seed, rounding, fused: as for ``GradientCalibration``.

    All layers of the model, also those that were there before, are numbered by ``number_layers``: what one draws
    depends on the model and the seed only.

    In the module's own forward, while training, ``self.weight`` is what the layer passes on. Everywhere else it is the
    parameter, to look at, freeze, assign to, shard or parametrize. A weight that another module uses by itself (tied
    embeddings, say) has no layer there.

    Raises:
        ValueError: an option is out of range, or no module is of these types.
        TypeError: a module of these types has no parameter ``weight``, is lazy and has not seen its input yet, or, with
            per_channel, has no output channels.
    """
    MODULE.check("model", model)
    TEXT.described("'weight' or 'output'").check("where", where)
    FLAG.check("per_channel", per_channel)
    if where not in LAYER_NAMES:
        raise ValueError(f"where must be 'weight' or 'output', got {where!r}")
    found = modules_of(model, types)
    modules = [(name, module) for name, module in found if not has_layer(module, where)]
    options: dict[str, Any] = {
        "calibration": calibration, "lipschitz": lipschitz, "bound_decay": bound_decay, "seed": seed,
        "rounding": rounding, "fused": fused, "index": 0,
    }  # fmt: skip
    # All layers and classes are made before the first is put in: on an error nothing has been changed.
    layers = [GradientCalibration(**options, **_channels(name, m, where, per_channel)) for name, m in modules]
    classes = [class_with_layers(module, where) for _, module in modules]
    for (_, module), layer, kind in zip(modules, layers, classes, strict=True):
        _add(module, layer, where, kind)
    return number_layers(model)


def number_layers(model: nn.Module) -> nn.Module:
    """Numbers all layers of ``model`` that draw, by their order, in place, from 0 on; returns the model.

    Those of ``calibrate`` and those of ``calibrate_filters`` have numbers of their own.

    For models put together from calibrated parts or copies (nn.TransformerEncoder copies its layer): two layers with
    the same number and seed draw the same, and then gradients are biased. ``calibrate(model)`` does this, too.
    """
    MODULE.check("model", model)
    for kind in NumberedLayer.__subclasses__():  # GradientCalibration and FilterBranches: their streams differ
        for k, layer in enumerate(module for module in model.modules() if isinstance(module, kind)):
            layer.number(k)
    return model


def uncalibrate(model: nn.Module) -> nn.Module:
    """Removes, in place, what ``calibrate`` has added; returns the model, whose parameters stay the same objects.

    Layers that stand in the model by themselves (in an nn.Sequential, say) stay.
    """
    MODULE.check("model", model)
    calibrated = [module for module in model.modules() if _HANDLES in module.__dict__]
    for module in calibrated:
        remove_layers(module, LAYER_NAMES.values())
        for handle in module.__dict__.pop(_HANDLES):
            handle.remove()
    return model


def remove_layers(module: nn.Module, names: Iterable[str]) -> None:
    """Takes the layers of these names off a module, which gets the class that the others need."""
    for name in names:
        module._modules.pop(name, None)
    module.__class__ = class_with_layers(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before ``calibrate``: its own where it has no layer, or a later change of class."""
    kind = type(module)
    if issubclass(kind, _Calibrated) and "plain_class" in kind.__dict__:
        plain: type[nn.Module] = kind.plain_class
        return plain
    return kind


def modules_of(model: nn.Module, types: Any) -> list[tuple[str, nn.Module]]:
    """(name, module) of those of a type or of several; raises for what is no type, and where there are none."""
    kinds: Any = tuple(types) if isinstance(types, Iterable) and not isinstance(types, str) else (types,)
    if not kinds:
        raise ValueError("types is empty; name the classes of the modules to calibrate")
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"types must be classes of modules, such as torch.nn.Linear, got {kind!r}")
    # nn.MultiheadAttention uses the weight of its output projection, and never calls that module.
    never_called = nn.modules.linear.NonDynamicallyQuantizableLinear
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, never_called)]
    if not found:
        names = ", ".join(kind.__name__ for kind in kinds)
        others = sorted({type(m).__name__ for m in model.modules() if "weight" in m._parameters})
        has = f" (it has {', '.join(others)})" if others else ""
        raise ValueError(f"the model has no module of type {names} to calibrate{has}; name others in types")
    return found


def _channels(name: str, module: nn.Module, where: str, per_channel: bool) -> dict[str, Any]:
    """The options of a layer that depend on its module; raises where that cannot have one."""
    what = f"module {name!r} ({type(module).__name__})"
    weight = module._parameters.get("weight")
    if where == "weight" and weight is None:
        raise TypeError(
            f"{what} has no parameter 'weight', or it is parametrized; leave the module out of types, take "
            "where='output', or calibrate first and parametrize then"
        )
    if isinstance(module, LazyModuleMixin):
        raise TypeError(f"{what} has not seen its input yet; call the model once, then calibrate it")
    check_own_forward(what, module)
    if not per_channel:
        return {}
    channels = getattr(module, "out_channels", getattr(module, "out_features", None))
    if channels is None:
        raise TypeError(f"{what} has no output channels; take per_channel=False")
    if where == "output":
        # Counted from the end, since there may be no batch: before the spatial dimensions of a convolution.
        return {"channels": channels, "channel_dim": -1 - len(getattr(module, "kernel_size", ()))}
    dim = 1 if getattr(module, "transposed", False) else 0  # a transposed convolution's weight is (in, out / groups)
    assert weight is not None
    return {"channels": weight.shape[dim], "channel_dim": dim}


def check_own_forward(what: str, module: nn.Module) -> None:
    """Raises where the forward of the module's class, which layers are put before, is not called."""
    if "forward" in module.__dict__:
        raise TypeError(f"{what} has a forward of its own, put there by another package; calibrate before that")


def class_with_layers(module: nn.Module, where: str | None = None) -> Any:
    """The class of ``module`` with the layers that it has, and with one there."""
    return _with_places(type(module), tuple(w for w in _NAMES if w == where or has_layer(module, w)))


def _with_places(kind: Any, places: tuple[str, ...]) -> Any:
    """A class for layers at these places. What has been put before it since (a parametrization, FSDP) stays there."""
    if not issubclass(kind, _Calibrated):
        return _calibrated_class(kind, places) if places else kind
    if "plain_class" in kind.__dict__:
        return _calibrated_class(kind.plain_class, places) if places else kind.plain_class
    name, bases = kind.__name__, []
    for base in kind.__bases__:
        bases.append(_with_places(base, places) if issubclass(base, _Calibrated) else base)
        name = name.replace(base.__name__, bases[-1].__name__)
    own = {key: value for key, value in kind.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(kind)(name, tuple(bases), own)


def _add(module: nn.Module, layer: GradientCalibration, where: str, kind: Any) -> None:
    device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()] if not tensor.is_meta), None)
    module.add_module(LAYER_NAMES[where], layer.to(device))
    handles = module.__dict__.setdefault(_HANDLES, [])
    if not handles:
        handles.append(module.register_state_dict_post_hook(_move_state_to_metadata))  # type: ignore[no-untyped-call]
        handles.append(module.register_load_state_dict_pre_hook(_take_state_from_metadata))  # type: ignore[no-untyped-call]
    module.__class__ = kind


def has_layer(module: nn.Module, where: str) -> bool:
    """Whether a module has a layer for its "weight" or "output", or "branches" of its filters."""
    return _NAMES[where] in module._modules


class _Calibrated:
    """A base class that is put before a module's own class.

    Hooks would not do: code that torch.compile has made for the plain class would be used again, without the layer. Nor
    would torch's parametrization, which moves the parameter away from its name and its place among the others.
    """

    plain_class: type[nn.Module]
    places: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:  # for pickle and deepcopy, which do not find a class made here
        how = super().__reduce_ex__(protocol)
        if isinstance(how, str) or how[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return how  # the class has a way of its own
        return _new_calibrated, (self.plain_class, self.places), *how[2:]


class _CalibratedWeight(_Calibrated):
    """The module's own forward gets its weight through its layers; to all other code ``weight`` is the parameter."""

    _in_forward = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._in_forward:  # called by itself
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hook = _hook_parametrization(self)
        self._in_forward = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_forward = False
            if hook is not None:
                hook.remove()

    @property
    def weight(self) -> Tensor | None:
        parameters = self._parameters  # type: ignore[attr-defined]
        value: Tensor | None = parameters.get("weight")
        if value is None and "weight" in self.__dict__:  # nn.DataParallel's copies, pruning, the older weight_norm
            value = self.__dict__["weight"]
        elif value is None and "weight" not in parameters:
            raise AttributeError("weight")  # torch.nn.Module.__getattr__ is called now
        return _through_layers(self, value) if self._in_forward and value is not None else value

    @weight.setter
    def weight(self, value: Any) -> None:  # called by torch.nn.Module.__setattr__ for what is no parameter
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        if self.__dict__.pop("weight", self) is self:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")


def _through_layers(module: Any, weight: Tensor) -> Tensor:
    for where in ("weight", "branches"):
        layer = module._modules.get(_NAMES[where])
        weight = weight if layer is None else layer(weight)
    return weight


def _hook_parametrization(module: Any) -> RemovableHandle | None:
    """Lets the layers have what a parametrization (torch.nn.utils.parametrize) makes of the parameter.

    There ``weight`` is a property of a class made later, which calls the parametrization for each value.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return None
    made: nn.Module = module.parametrizations["weight"]
    return made.register_forward_hook(lambda _, inputs, weight: _through_layers(module, weight))


class _CalibratedOutput(_Calibrated):
    """The module's output goes through the layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{self.plain_class.__name__} returns {type(output).__name__}, not a tensor that can be calibrated"
            )
        out: Tensor = self.output_calibration(output)  # type: ignore[attr-defined]
        return out


_MIXINS = {"weight": _CalibratedWeight, "branches": _CalibratedWeight, "output": _CalibratedOutput}


@functools.cache
def _calibrated_class(plain: Any, places: tuple[str, ...]) -> Any:
    bases = (*dict.fromkeys(_MIXINS[where] for where in places), plain)
    return type(f"Calibrated{plain.__name__}", bases, {"plain_class": plain, "places": places})


def _new_calibrated(plain: Any, places: tuple[str, ...]) -> nn.Module:
    kind = _calibrated_class(plain, places)
    out: nn.Module = kind.__new__(kind)
    return out


def _layers_of(module: nn.Module) -> dict[str, GradientCalibration]:
    """The layers that ``calibrate`` has put on this very module, by their names in it."""
    found = {name: module._modules.get(name) for name in LAYER_NAMES.values()}
    return {name: layer for name, layer in found.items() if isinstance(layer, GradientCalibration)}


def _move_state_to_metadata(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """After the module has saved itself: leaves the keys that it would have had without its layers."""
    for path in _layers_of(module):
        saved = {name: state_dict.pop(f"{prefix}{path}.{name}", None) for name in _SAVED}
        state_dict.pop(f"{prefix}{path}.index", None)
        state = {name: tensor for name, tensor in saved.items() if tensor is not None}
        local_metadata.setdefault(_STATE, {})[path] = state


def _take_state_from_metadata(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Before the module loads itself: the reverse. Without metadata (of a plain module) the layers stay as they are."""
    for path, layer in _layers_of(module).items():
        saved = local_metadata.get(_STATE, {}).get(path, {})
        for name in (*_SAVED, "index"):
            current = getattr(layer, name)
            if current is not None:
                state_dict.setdefault(f"{prefix}{path}.{name}", saved.get(name, current).clone())
