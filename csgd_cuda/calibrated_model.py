# SPDX-License-Identifier: Apache-2.0
"""``calibrate`` puts gradient calibration layers into an existing model, ``uncalibrate`` takes them out again."""

from __future__ import annotations

import functools
from typing import Any, Literal

from torch import Tensor, nn

from .calibration import GradientCalibration

# The names of the layers in the module whose weight or outputs they get; of their state in a state dict's metadata.
LAYER_NAMES = {"weight": "weight_calibration", "output": "output_calibration"}
_STATE = "csgd_cuda.calibration"
_HANDLES = "_csgd_cuda_handles"  # of the hooks of a calibrated module
_SAVED = ("index", "step", "lipschitz_bound")


def calibrate(
    model: nn.Module,
    types: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    where: Literal["weight", "output"] = "weight",
    *,
    calibration: float = 1.0,
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
        types: the modules to calibrate.
        where: "weight" calibrates the gradients of the weights (the module then sees its ``weight`` through the layer),
            "output" those of the modules' outputs (by a forward hook), and so all gradients further down.
        per_channel: a bound for each output channel instead of one for the tensor.
        calibration, lipschitz, bound_decay, seed, rounding, fused: as for ``GradientCalibration``.

    All layers of the model, also those that were there before, are numbered by their order (``index``): what one draws
    depends on the model and the seed only.

    Raises:
        ValueError: an option is out of range, or no module is of these types.
        TypeError: a module of these types has no parameter ``weight``, or, with per_channel, no output channels.
    """
    if where not in LAYER_NAMES:
        raise ValueError(f"where must be 'weight' or 'output', got {where!r}")
    kinds: Any = tuple(types)
    modules: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, kinds) and LAYER_NAMES[where] not in module._modules
    ]  # fmt: skip
    if not modules:
        names = ", ".join(kind.__name__ for kind in types)
        raise ValueError(f"the model has no module of type {names} that is not calibrated yet; name others in types")
    options: dict[str, Any] = {
        "calibration": calibration, "lipschitz": lipschitz, "bound_decay": bound_decay, "seed": seed,
        "rounding": rounding, "fused": fused, "index": 0,
    }  # fmt: skip
    # All layers are made before the first is put in: on an error nothing has been changed.
    layers = [GradientCalibration(**options, **_channels(name, m, where, per_channel)) for name, m in modules]
    for (_, module), layer in zip(modules, layers, strict=True):
        _add(module, layer, where)
    for k, layer in enumerate(m for m in model.modules() if isinstance(m, GradientCalibration)):
        layer.number(k)
    return model


def uncalibrate(model: nn.Module) -> nn.Module:
    """Takes off, in place, what ``calibrate`` has put on; returns the model, whose parameters stay the same objects.

    Layers that stand in the model by themselves (in an nn.Sequential, say) stay.
    """
    for module in list(model.modules()):
        for name in LAYER_NAMES.values():
            module._modules.pop(name, None)
        plain = getattr(type(module), "plain_class", None)
        if plain is not None:
            module.__class__ = plain
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
    return model


def _channels(name: str, module: nn.Module, where: str, per_channel: bool) -> dict[str, Any]:
    """The options of a layer that depend on its module."""
    weight = module._parameters.get("weight")
    if where == "weight" and weight is None:
        raise TypeError(
            f"module {name!r} ({type(module).__name__}) has no parameter 'weight', or it is parametrized; "
            "leave the module out of types, or take where='output'"
        )
    if not per_channel:
        return {}
    channels = getattr(module, "out_channels", getattr(module, "out_features", None))
    if channels is None:
        raise TypeError(f"module {name!r} ({type(module).__name__}) has no output channels; take per_channel=False")
    if where == "output":
        # The last dimension of a linear layer's output; the first after the batch of a convolution's.
        return {"channels": channels, "channel_dim": -1 if hasattr(module, "out_features") else 1}
    dim = 1 if getattr(module, "transposed", False) else 0  # a transposed convolution's weight is (in, out / groups)
    assert weight is not None
    return {"channels": weight.shape[dim], "channel_dim": dim}


def _add(module: nn.Module, layer: GradientCalibration, where: str) -> None:
    device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), None)
    module.add_module(LAYER_NAMES[where], layer.to(device))
    handles = module.__dict__.setdefault(_HANDLES, [])
    if not handles:
        handles.append(module.register_state_dict_post_hook(_move_state_to_metadata))  # type: ignore[no-untyped-call]
        handles.append(module.register_load_state_dict_pre_hook(_take_state_from_metadata))  # type: ignore[no-untyped-call]
    if where == "output":
        handles.append(module.register_forward_hook(_calibrate_output))
    else:
        plain: Any = type(module)
        module.__class__ = _calibrated_class(plain)


def _calibrate_output(module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor):
        raise TypeError(f"{type(module).__name__} returns {type(output).__name__}, not a tensor that can be calibrated")
    return module.output_calibration(output)  # type: ignore[operator]


class _CalibratedWeight:
    """Goes before a module's class: the module's own code then sees its weight through the layer.

    Unlike torch.nn.utils.parametrize this leaves the parameter where it is, by its name and place among the others.
    """

    plain_class: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        out: Tensor = self.weight_calibration(self._parameters["weight"])  # type: ignore[attr-defined]
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:  # for pickle and deepcopy, which do not find a class made here
        return _new_calibrated, (self.plain_class,), self.__dict__


@functools.cache
def _calibrated_class(plain: Any) -> Any:
    return type(f"Calibrated{plain.__name__}", (_CalibratedWeight, plain), {"plain_class": plain})


def _new_calibrated(plain: Any) -> nn.Module:
    kind = _calibrated_class(plain)
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
        state = {name: tensor for name, tensor in saved.items() if tensor is not None}
        local_metadata.setdefault(_STATE, {})[path] = state


def _take_state_from_metadata(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Before the module loads itself: the reverse. Without metadata (of a plain module) the layers stay as they are."""
    for path, layer in _layers_of(module).items():
        saved = local_metadata.get(_STATE, {}).get(path, {})
        for name in _SAVED:
            current = getattr(layer, name)
            if current is not None:
                state_dict.setdefault(f"{prefix}{path}.{name}", saved.get(name, current).clone())
