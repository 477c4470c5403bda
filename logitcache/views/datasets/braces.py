"""Braces: the names that a pattern such as train-{000..146}.tar stands for."""

import itertools
import re
from collections.abc import Sequence

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expanded(pattern: str) -> list[str]:
    """Return names in order: {first..last} counts, with leading zeros as written, and {a,b} lists.

    Raises ValueError for braces that hold neither, and for a "*".
    """
    if "*" in pattern:
        raise ValueError(
            f"'{pattern}' has a *, which stands for nothing here. Name shards as in train-{{000..146}}.tar"
        )
    texts, inside = _BRACES.split(pattern)[::2], _BRACES.split(pattern)[1::2]
    if any(brace in text for text in texts for brace in "{}"):
        raise ValueError(f"'{pattern}' has a brace without its other one, or braces inside braces")
    choices = itertools.product(*(_choices(part, pattern) for part in inside))
    return ["".join(itertools.chain.from_iterable(zip(texts, (*chosen, ""), strict=True))) for chosen in choices]


def _choices(inside: str, pattern: str) -> Sequence[str]:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        if "," not in inside:
            raise ValueError(f"{{{inside}}} in '{pattern}' is neither a range, as {{000..146}}, nor a list, as {{a,b}}")
        return inside.split(",")
    first, last = map(int, counted.groups())
    if first > last:
        raise ValueError(f"{{{inside}}} in '{pattern}' counts down, so that it stands for nothing")
    return [f"{number:0{len(counted[1])}d}" for number in range(first, last + 1)]
