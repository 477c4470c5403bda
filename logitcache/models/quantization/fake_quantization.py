"""Networks that imitate int8 arithmetic: a recorded graph with fake quantisation, to train and to turn into int8.

Weights are signed with a scale for each output channel, activations unsigned with one scale for each tensor. Batch
normalisation that follows a convolution is folded into it; any other keeps its statistics. There is no dropout.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.export import Dim

from logitcache.errors import RecipeError, did_you_mean, needs_extra
from logitcache.runtime.console import errors_alone

_ATEN: Any = torch.ops.aten
_WEIGHTED = (_ATEN.conv2d.default, _ATEN.linear.default)
_SUMS = (_ATEN.add.Tensor,)
_POOLS = (_ATEN.adaptive_avg_pool2d.default, _ATEN.avg_pool2d.default, _ATEN.max_pool2d.default, _ATEN.mean.dim)
_RECTIFIERS = (_ATEN.relu.default,)
_IN_PLACE = {
    getattr(_ATEN, f"{name}_").default: getattr(_ATEN, name).default
    for name in ("relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "leaky_relu")
} | {_ATEN.add_.Tensor: _ATEN.add.Tensor, _ATEN.mul_.Tensor: _ATEN.mul.Tensor}
_AVERAGING = 0.01
"""Part that each batch has in the moving ranges of activations."""


class FakeQuantized(nn.Module):
    """A recorded network with fake quantisation: float [B, C, h, w] to logits [B, K].

    In training, the ranges of activations follow the batches; in evaluation they stay. Those of weights are always of
    the present weights.
    """

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        """Predict."""
        logits: Tensor = self.graph(images)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Set the mode; recorded graphs have none of their own."""
        for module in self.modules():
            module.training = mode
            if _is_quantizer(module) and module.ch_axis == -1:
                module.enable_observer(mode)  # type: ignore[operator]
        return self


def imitate_int8(
    network: nn.Module, channels: int, size: tuple[int, int], keep_float: Collection[str] = ()
) -> FakeQuantized:
    """Record a network for images of a size, and put fake quantisation into it; its weights are copied.

    Layers of `keep_float`, by the paths of their modules, stay as they are. Raises RecipeError for a network that
    cannot be recorded, or has no layer to quantise.
    """
    prepare_pt2e = _library().prepare_pt2e
    images = torch.zeros(2, channels, *size)
    try:
        with torch.no_grad():
            recorded = torch.export.export(
                copy.deepcopy(network).eval(),
                (images,),
                dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.AUTO, 3: Dim.AUTO},),
            ).module()
    except Exception as cause:  # the network's own code runs
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise RecipeError(
            f"the model cannot be quantised: torch.export cannot record it ({reason[:200]}). "
            "Fix: another model, or `quantize` without --qat"
        ) from cause
    assert isinstance(recorded, torch.fx.GraphModule)
    _without_in_place(recorded)
    layers = _layers(recorded)
    for name in keep_float:
        if name not in layers:
            raise RecipeError(f"keep_float: {name!r} is no layer.{did_you_mean(name, layers)} Fix: one of {layers}")
    if not layers.difference(keep_float):
        raise RecipeError("the model cannot be quantised: no convolution or linear layer is left. Fix: another model")
    prepared = prepare_pt2e(recorded, _annotator(frozenset(keep_float)))
    for node in prepared.graph.nodes:
        quantizer = _quantizer(prepared, node)
        if quantizer is not None and quantizer.ch_axis != -1:  # its state has the shape of its weight from the start
            quantizer(_attribute(prepared, node.args[0]))
    for parameter in prepared.parameters():
        parameter.requires_grad_(True)  # those that folding made have none
    return FakeQuantized(prepared).eval()


@torch.no_grad()
def calibrate(network: FakeQuantized, batches: Iterable[Tensor]) -> None:
    """Set the ranges of activations to their means over batches of normalised images, [B, C, h, w]."""
    network.train()
    for number, batch in enumerate(batches, 1):
        for module in network.modules():
            if _is_quantizer(module) and module.ch_axis == -1:
                observer: Any = module.activation_post_process
                observer.averaging_constant = 1 / number
        network(batch)
    network.eval()


@torch.no_grad()
def to_int8(network: FakeQuantized) -> nn.Module:
    """Return the graph with int8 weights, and quantisation in place of its imitation."""
    _library()  # it registers the operators
    library: Any = torch.ops.quantized_decomposed

    def integers(graph: torch.fx.GraphModule, node: Any, quantizer: Any) -> Any:
        bounds = quantizer.activation_post_process.quant_min, quantizer.activation_post_process.quant_max
        if quantizer.ch_axis != -1:
            weight = _attribute(graph, node.args[0])
            quantizer(weight)
            scales, zeros = quantizer.scale, quantizer.zero_point.to(torch.int64)
            form = quantizer.ch_axis, *bounds, torch.int8
            values = library.quantize_per_channel(weight, scales, zeros, *form)
            kept = [
                _keep(graph, f"{node.name}_{name}", tensor)
                for name, tensor in (("int8", values), ("scale", scales), ("zero", zeros))
            ]
            return graph.graph.call_function(library.dequantize_per_channel.default, (*kept, *form))
        of_tensor = float(quantizer.scale), int(quantizer.zero_point), *bounds, torch.uint8
        made = graph.graph.call_function(library.quantize_per_tensor.default, (node.args[0], *of_tensor))
        return graph.graph.call_function(library.dequantize_per_tensor.default, (made, *of_tensor))

    return _without_quantizers(network, integers)


def to_float(network: FakeQuantized) -> nn.Module:
    """Return the graph with its weights in float, and no quantisation."""
    return _without_quantizers(network, lambda graph, node, quantizer: node.args[0])


def _without_quantizers(network: FakeQuantized, replaced: Callable[[torch.fx.GraphModule, Any, Any], Any]) -> nn.Module:
    """Copy the graph, with another node in place of each that imitates quantisation: `replaced` makes it."""
    graph = copy.deepcopy(network).eval().graph
    assert isinstance(graph, torch.fx.GraphModule)
    for node in list(graph.graph.nodes):
        quantizer = _quantizer(graph, node)
        if quantizer is None:
            continue
        with graph.graph.inserting_before(node):
            made = replaced(graph, node, quantizer)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    for module in graph.modules():
        module.training = False
    return graph


def _library() -> Any:
    """Import torchao without what torch logs of its enumerations."""
    with errors_alone("torch.utils._pytree"), needs_extra("training for int8", "quant"):
        from torchao.quantization.pt2e import quantize_pt2e
    return quantize_pt2e


def _keep(graph: torch.fx.GraphModule, name: str, tensor: Tensor) -> Any:
    graph.register_buffer(name, tensor.detach().clone())
    return graph.graph.get_attr(name)


def _is_quantizer(module: nn.Module) -> bool:
    return hasattr(module, "fake_quant_enabled")


def _quantizer(graph: nn.Module, node: Any) -> Any:
    """Return the module of fake quantisation that a node calls; None for any other node."""
    module = graph.get_submodule(node.target) if node.op == "call_module" else None
    return module if module is not None and _is_quantizer(module) else None


def _attribute(graph: nn.Module, node: Any) -> Tensor:
    path, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(path), name)
    return tensor


def _owner(node: Any) -> str | None:
    """Return the path of the module whose weight a node takes; None for a weight that is computed."""
    weight = node.args[1]
    return str(weight.target).rpartition(".")[0] if weight.op == "get_attr" else None


def _layers(graph: torch.fx.GraphModule) -> set[str]:
    nodes = (node for node in graph.graph.nodes if node.op == "call_function" and node.target in _WEIGHTED)
    return {owner for node in nodes if (owner := _owner(node)) is not None}


def _without_in_place(graph: torch.fx.GraphModule) -> None:
    """Replace operations in place by those that return: what follows takes their result."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
            node.args[0].replace_all_uses_with(node, lambda user, node=node: user > node)
    graph.recompile()


def _annotator(keep_float: frozenset[str]) -> Any:
    """Return the quantiser of torchao that says which tensors are quantised: inputs and outputs of some operators."""
    from torchao.quantization.pt2e import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    def spec(observer: Any, averaging: float, **kind: Any) -> Any:
        made = FakeQuantize.with_args(observer=observer, averaging_constant=averaging, **kind)
        return QuantizationSpec(observer_or_fake_quant_ctr=made, is_dynamic=False, **kind)

    kind: dict[str, Any] = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    activation = spec(MovingAverageMinMaxObserver, _AVERAGING, **kind)
    kind = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
    weight = spec(MovingAveragePerChannelMinMaxObserver, 1.0, ch_axis=0, **kind)

    class Annotator(Quantizer):  # type: ignore[misc,unused-ignore]
        def annotate(self, model: Any) -> Any:
            for node in model.graph.nodes:
                if node.op == "call_function":
                    self._annotate(node)
            return model

        def _annotate(self, node: Any) -> None:
            if node.target in _WEIGHTED:
                owner = _owner(node)
                if owner is None or owner in keep_float:
                    return
                inputs = {node.args[0]: activation, node.args[1]: weight}
            elif node.target in _SUMS:
                inputs = {each: activation for each in node.args[:2] if _is_float(each)}
            elif node.target in _POOLS:
                inputs = {node.args[0]: activation}
            elif node.target in _RECTIFIERS:
                inputs = {}
            else:
                return
            if not _is_float(node):
                return
            users = list(node.users)
            fused = len(users) == 1 and users[0].target in _RECTIFIERS
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, output_qspec=None if fused else activation, _annotated=True
            )

        def validate(self, model: Any) -> None:
            pass

    return Annotator()


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if hasattr(node, "meta") else None
    return isinstance(value, Tensor) and value.is_floating_point()
