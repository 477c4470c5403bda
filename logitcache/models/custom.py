"""Models from the user's own code."""

from typing import Literal

from pydantic import Field, JsonValue
from torch import nn

from logitcache.config.factories import call_factory
from logitcache.config.recipe import Component
from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel


class Custom(Component):
    """The nn.Module that `factory` ("pkg.mod:fn") returns: float [B, C, H, W] to logits [B, K].

    Numbers of classes and of channels are passed as arguments if the factory needs them.
    """

    kind: Literal["custom"] = "custom"
    factory: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Call the factory."""
        module = call_factory(self.factory, self.arguments)
        if not isinstance(module, nn.Module):
            raise RecipeError(
                f"factory '{self.factory}' returned a {type(module).__name__}.\n  Fix: return an nn.Module."
            )
        return BuiltModel(module, None)

    def risks(self) -> tuple[str, ...]:
        """Name the function: code, which no grant lets a manifest name."""
        return (f"the function '{self.factory}'",)

    def architecture(self) -> "Custom":
        """Return itself."""
        return self
