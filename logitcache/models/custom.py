"""Models from the user's own code."""

from typing import Literal

from pydantic import Field, JsonValue
from torch import nn

from logitcache.config.factories import call_factory
from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel, OwnArchitecture


class Custom(OwnArchitecture):
    """The nn.Module that your own function returns: float [B, C, H, W] to logits [B, K].

    Logits are a tensor, the entry `logits` of a dictionary or object (Hugging Face), or the only entry of a dictionary
    or tuple. Traced modules and `torch.export(…).module()` work too, if they take batches of any size.
    """

    kind: Literal["custom"] = "custom"
    factory: str = Field(
        description="Function that returns the module, as `package.module:function`.",
        examples=["mypackage.models:teacher"],
    )
    arguments: dict[str, JsonValue] = Field(
        default={},
        description="Keyword arguments of the function, including numbers of classes and channels if it needs them.",
    )

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
