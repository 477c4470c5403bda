"""Braces: the names that a pattern such as train-{000..146}.tar stands for."""

import itertools
import re
from collections.abc import Sequence

MOST_NAMES = 200_000
"""Names that patterns may stand for: more would take seconds and hundreds of megabytes to write down."""

_MOST_CHARACTERS = 1 << 26
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


def expanded(pattern: str) -> list[str]:
    """Return names in order: {first..last} counts, with leading zeros as written, and {a,b} lists.

    Raises ValueError for braces that hold neither, for a "*", and for more than MOST_NAMES names.
    """
    if "*" in pattern:
        raise ValueError(
            f"'{pattern}' has a *, which stands for nothing here. Name shards as in train-{{000..146}}.tar"
        )
    texts, inside = _BRACES.split(pattern)[::2], _BRACES.split(pattern)[1::2]
    if any(brace in text for text in texts for brace in "{}"):
        raise ValueError(f"'{pattern}' has a brace without its other one, or braces inside braces")
    choices: list[Sequence[str]] = []
    count = 1
    for part in inside:
        count *= _num_choices(part, pattern)  # before any of them is written down
        if count > MOST_NAMES or count * len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"'{pattern[:200]}' stands for {count} names or more. Fix: at most {MOST_NAMES}")
        choices.append(_choices(part))
    return [
        "".join(itertools.chain.from_iterable(zip(texts, (*chosen, ""), strict=True)))
        for chosen in itertools.product(*choices)
    ]


def _num_choices(inside: str, pattern: str) -> int:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        if "," not in inside:
            raise ValueError(f"{{{inside}}} in '{pattern}' is neither a range, as {{000..146}}, nor a list, as {{a,b}}")
        return inside.count(",") + 1
    first, last = map(int, counted.groups())
    if first > last:
        raise ValueError(f"{{{inside}}} in '{pattern}' counts down, so that it stands for nothing")
    return last - first + 1


def _choices(inside: str) -> Sequence[str]:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        return inside.split(",")
    first, last = map(int, counted.groups())
    return [f"{number:0{len(counted[1])}d}" for number in range(first, last + 1)]
