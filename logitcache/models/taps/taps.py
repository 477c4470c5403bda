"""Taps: outputs or inputs of modules inside a network, caught during a forward pass."""

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.reductions import INPUT, ChannelLayout, channels_in_place

SHOWN = 40


class Tapped(nn.Module):
    """Return a network's output, and the tensors at its taps.

    A tap is a module's path, as `named_modules` gives it, for its output; with `:input` after it, for its first input.
    Raises RecipeError for a path that does not exist, and for a tap that does not fire exactly once in a pass, whose
    value is no tensor, or whose value is changed in place afterwards.
    """

    def __init__(
        self,
        module: nn.Module,
        network: nn.Module,
        taps: Sequence[str],
        who: str,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> None:
        """Tap `network`, a part of `module`, which is called; `who` names it in errors.

        Tensors of taps with decided `layouts` are returned as maps [B, C, H, W] or tokens [B, N, D].
        """
        super().__init__()
        self.module, self._who = module, who
        self._taps = tuple(dict.fromkeys(taps))
        self._layouts = dict(layouts or {})
        self._caught: dict[str, list[Any]] = {}
        self._hooks = [self._hook(network, tap) for tap in self._taps]

    def forward(self, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run the module; returns its output, and the tensors at the taps with their gradients."""
        self._caught = {tap: [] for tap in self._taps}
        output = self.module(*inputs)
        caught, self._caught = self._caught, {}
        return output, {tap: self._only(tap, found) for tap, found in caught.items()}

    def shapes_until_error(self, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
        """Run the module until it fails on the inputs, if it does; return the shapes, without the batch, at taps."""
        self._caught = {tap: [] for tap in self._taps}
        with contextlib.suppress(Exception):  # a network that takes other sizes may raise anything
            self.module(*inputs)
        caught, self._caught = self._caught, {}
        firsts = {tap: found[0][0] for tap, found in caught.items() if found}
        return {tap: tuple(value.shape[1:]) for tap, value in firsts.items() if isinstance(value, Tensor)}

    def close(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, network: nn.Module, tap: str) -> Any:
        path = tap.removesuffix(INPUT)
        module = dict(network.named_modules()).get(path) if path else None
        if module is None:
            raise RecipeError(f"{self._who} has no module {path!r}.\n  {_suggestion(network, path)}")
        if tap.endswith(INPUT):
            return module.register_forward_pre_hook(lambda _, inputs: self._catch(tap, inputs[0] if inputs else None))
        return module.register_forward_hook(lambda _, __, output: self._catch(tap, output))

    def _catch(self, tap: str, value: Any) -> None:
        if tap in self._caught:  # not if the network is run by itself
            version = value._version if isinstance(value, Tensor) and not torch.compiler.is_compiling() else 0
            self._caught[tap].append((value, version))

    def _only(self, tap: str, found: list[Any]) -> Tensor:
        if len(found) != 1:
            how = "did not fire" if not found else f"fired {len(found)} times"
            raise RecipeError(f"{self._who}: the tap {tap!r} {how} in a pass. Fix: tap a module that runs once")
        value, version = found[0]
        if not isinstance(value, Tensor):
            raise RecipeError(
                f"{self._who}: the tap {tap!r} holds a {type(value).__name__}, not a tensor. Fix: tap a module inside "
                "it, or after it"
            )
        if not torch.compiler.is_compiling() and value._version != version:
            raise RecipeError(
                f"{self._who}: the tensor at the tap {tap!r} is changed in place afterwards, as by ReLU(inplace=True). "
                "Fix: tap the module that changes it"
            )
        return channels_in_place(value, self._layouts.get(tap, "auto"))


def _suggestion(network: nn.Module, path: str) -> str:
    names = [name for name, _ in network.named_modules() if name]
    near = difflib.get_close_matches(path, names, n=3)
    listed = ", ".join(names[:SHOWN]) + (f", … ({len(names)} in all)" if len(names) > SHOWN else "")
    meant = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{meant}Fix: tap one of its modules: {listed}"
