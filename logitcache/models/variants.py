"""Faster variants of a network: copies that are laid out channels-last, with BatchNorm folded into convolutions."""

import copy
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from logitcache.classifier import Variant

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
"""Exact types: a subclass may compute more than its weights show."""


class _Fired(NamedTuple):
    """A module that ran, by its path, and its first input and output."""

    path: str
    input: Tensor
    output: Tensor


def variant_of(network: nn.Module, variant: Variant, inputs: Tensor) -> nn.Module:
    """Return a copy of a network in evaluation mode as another variant; `inputs` float [B, C, h, w] show how it runs.

    Parameters of the copy are its own. It raises what copying or running the network raises.
    """
    made = copy.deepcopy(network)
    if variant.fold:
        for convolution, norm in batch_norms(made, inputs):
            _fold(made, convolution, norm)
    if variant.channels_last:
        made.to(memory_format=torch.channels_last)
        made.register_forward_pre_hook(_channels_last)
    return made


class Compiled(nn.Module):
    """The compiled forward pass of a network whose weights never change: they are laid out for its kernels once.

    To be called without gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # Kernels must depend on a batch's size alone, not on the sizes before it: a resumed run starts anywhere.
        self._compiled = torch.compile(network, dynamic=False)

    def forward(self, *inputs: Any) -> Any:
        """Answer as the network does."""
        import torch._inductor.config as inductor  # takes long, and others need not wait for it

        with inductor.patch(freezing=True):  # an option of torch.compile would come too late
            return self._compiled(*inputs)


def has_convolutions(network: nn.Module) -> bool:
    """Return whether a network has weights that channels-last lays out in another way."""
    return any(parameter.ndim == 4 for parameter in network.parameters())


@torch.no_grad()
def batch_norms(network: nn.Module, inputs: Tensor) -> list[tuple[str, str]]:
    """Find the convolutions whose output a BatchNorm takes, by a pass of the network; return the paths of both.

    Whether anything else takes the output, too, a pass cannot show: the answers of a folded network do.
    """
    kinds = (*_PAIRS.keys(), *_PAIRS.values(), *_norms_with_activation())
    modules = {path: one for path, one in network.named_modules() if type(one) in kinds and not _is_hooked(one)}
    fired: list[_Fired] = []

    def note(path: str) -> object:
        return lambda module, inputs, output: fired.append(_Fired(path, inputs[0], output))

    hooks = [one.register_forward_hook(note(path)) for path, one in modules.items()]
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    paths = [one.path for one in fired]
    once = [one for one in fired if paths.count(one.path) == 1]
    outputs = {id(one.output): one.path for one in once if type(modules[one.path]) in _PAIRS}
    return [
        (outputs[id(one.input)], one.path)
        for one in once
        if id(one.input) in outputs and _follows(modules[outputs[id(one.input)]], modules[one.path])
    ]


def _follows(convolution: nn.Module, norm: nn.Module) -> bool:
    """Return whether a module is a BatchNorm of a convolution's outputs that takes nothing from the batch."""
    kinds = (_PAIRS[type(convolution)], *_norms_with_activation())
    return type(norm) in kinds and "running_mean" in dict(norm.named_buffers()) and not norm.training


def _norms_with_activation() -> tuple[type[nn.Module], ...]:
    """Return timm's BatchNorm that applies an activation too, if timm is imported: no network has it else."""
    layers = sys.modules.get("timm.layers")
    return () if layers is None else (layers.BatchNormAct2d,)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fold(network: nn.Module, convolution: str, norm: str) -> None:
    """Multiply and shift a convolution as the BatchNorm after it does, in float64.

    What is left of the latter are its own modules: none, or timm's dropout and activation, in the order they run.
    """
    conv, bn = network.get_submodule(convolution), network.get_submodule(norm)
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    assert isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    old = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    weight, bias, mean, var, scale, shift = (None if one is None else one.detach().double().cpu() for one in old)
    assert weight is not None
    assert mean is not None
    assert var is not None
    folded = fuse_conv_bn_weights(weight, bias, mean, var, bn.eps, scale, shift)
    conv.weight, conv.bias = (nn.Parameter(one.detach().to(conv.weight)) for one in folded)
    parent, _, name = norm.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Sequential(OrderedDict(bn.named_children())).eval())


def _channels_last(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one for one in inputs)
