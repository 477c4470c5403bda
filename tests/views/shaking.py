"""Transforms of a user's own code, which draw from every global generator; a module, as factories name one."""

import random

import numpy as np
import torch
from torch import Tensor


class Shake:
    """Add a number from each generator to the pixels."""

    def __init__(self, strength: int = 40) -> None:
        self.strength = strength

    def __call__(self, image: Tensor) -> Tensor:
        total = int(torch.randint(self.strength, ())) + int(np.random.randint(self.strength))
        return image + (total + random.randrange(self.strength))


def halved() -> object:
    """A factory of a transform that changes the size."""
    return lambda image: image[:, ::2, ::2]


def floating() -> object:
    """A factory of a transform that changes the type."""
    return lambda image: image / 255


def raising() -> object:
    """A factory of a transform that draws, then fails."""

    def fail(image: Tensor) -> Tensor:
        torch.rand(1)
        raise KeyError(f"no {len(image)}")

    return fail


def nothing() -> int:
    """A factory of no transform."""
    return 3


class Counter:
    """Add how often it was called: what no key decides."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image + self.calls


def leaving() -> object:
    """A factory of a transform that ends the program, and speaks."""

    def leave(image: Tensor) -> Tensor:
        print("here")
        raise SystemExit(3)

    return leave
