# SPDX-License-Identifier: Apache-2.0
"""Which layers can lose channels: those whose output goes to known layers alone, and the ways it takes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from .channels import Layout, Step, reads_no_channel, step_of

WEIGHTED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Branch:
    """A way of channels to a layer that reads them.

    Attributes:
        path: the kinds and targets of the nodes on the way, to compare graphs by.
        steps: what happens to the channels on the way.
        consumer: name of the layer.
        norm: name of the normalization that alone reads the layer, where this has no bias; else None.
    """

    path: tuple[object, ...]
    steps: tuple[Step, ...]
    consumer: str
    norm: str | None


def find_regions(graph: fx.Graph, model: nn.Module, uses: Mapping[str, int], training: bool) -> dict[str, list[Branch]]:
    """The layers that can lose channels, in the order of their calls, each with the ways to all layers that read it.

    Args:
        uses: how often each module is called; only those that are called once can be cut.
        training: whether the graph is that of the training mode.
    """
    modules = dict(model.named_modules())
    found = {}
    for node in graph.nodes:
        if _is_plain_layer(node, modules, uses):
            branches = _Walk(modules, uses, training, node).branches()
            if branches:
                found[str(node.target)] = branches
    return found


def _is_plain_layer(node: fx.Node, modules: Mapping[str, nn.Module], uses: Mapping[str, int]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or uses[str(node.target)] != 1:
        return False
    module = modules[str(node.target)]
    return type(module) in WEIGHTED and getattr(module, "groups", 1) == 1


class _Walk:
    """From a layer along everything that reads its output, up to the next layers."""

    def __init__(
        self, modules: Mapping[str, nn.Module], uses: Mapping[str, int], training: bool, producer: fx.Node
    ) -> None:
        self._modules, self._uses, self._training, self._producer = modules, uses, training, producer
        self._channels = self._weight(producer).shape[0]

    def branches(self) -> list[Branch] | None:
        """All ways; None where something unknown reads the channels."""
        return self._from(self._producer, self._layout_behind(self._producer), shared=False)

    def _from(self, node: fx.Node, layout: Layout, *, shared: bool) -> list[Branch] | None:
        """``shared``: whether the memory of the node's result may have another reader than those of the node."""
        found: list[Branch] = []
        readers = [user for user in node.users if not reads_no_channel(user, layout)]
        shared = shared or len(readers) > 1
        for reader in readers:
            if self._takes_channels(reader, layout):
                consumer = str(reader.target)
                found.append(Branch((consumer, self._norm_behind(reader)), (), consumer, self._norm_behind(reader)))
                continue
            step = step_of(reader, layout, self._modules, self._training) if reader.args[:1] == (node,) else None
            if step is None or (step.norm is not None and not self._fits(step.norm)):
                return None
            if step.in_place and shared:  # what the other reader gets would depend on the order
                return None
            in_new_memory = step.of_constants is not None and not step.in_place
            further = self._from(reader, step.layout, shared=shared and not in_new_memory)
            if not further:  # None, or a result that nothing reads, for which the step would have to be cut, too
                return None
            for branch in further:
                path = (reader.op, reader.target, *branch.path)
                found.append(Branch(path, (step, *branch.steps), branch.consumer, branch.norm))
        return found

    def _layout_behind(self, layer: fx.Node) -> Layout:
        return Layout.IMAGES if isinstance(self._modules[str(layer.target)], nn.Conv2d) else Layout.VECTORS

    def _takes_channels(self, node: fx.Node, layout: Layout) -> bool:
        if not _is_plain_layer(node, self._modules, self._uses):
            return False
        inputs = self._weight(node).shape[1]
        if (layout is Layout.IMAGES) != (self._layout_behind(node) is Layout.IMAGES):
            return False
        return inputs == self._channels or (layout is Layout.FLAT and inputs % self._channels == 0)

    def _weight(self, layer: fx.Node) -> Tensor:
        weight: Tensor = self._modules[str(layer.target)].weight  # type: ignore[assignment]
        return weight

    def _fits(self, norm: str) -> bool:
        return self._uses[norm] == 1 and bool(self._modules[norm].num_features == self._channels)

    def _norm_behind(self, layer: fx.Node) -> str | None:
        if self._modules[str(layer.target)].bias is not None or len(layer.users) != 1:
            return None
        step = step_of(next(iter(layer.users)), self._layout_behind(layer), self._modules, self._training)
        return step.norm if step is not None and step.norm is not None and self._uses[step.norm] == 1 else None
