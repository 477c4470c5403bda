"""Trellis-coded quantisation: two interleaved quantisers, chosen by the parities of the numbers before.

Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources" (1990). A packing of many
numbers at once is denser than that of each by itself: the same bits give about a tenth less squared error.

In half steps the first quantiser holds 2 q, the second -2 q - 1, of whole numbers q. About the middle, -1/2, each is
the other's mirror image: of what is symmetric about it, q is distributed alike in both, so that an entropy coder,
which does not know which one is meant, loses nothing by that. Which of the two holds for number k is a bit s(k), a
linear function, modulo 2, of the bits and the parities of `q` before: Ungerboeck's code of 256 states for amplitude
modulation, with the parity-check polynomials 515 and 362 in octal ("Channel coding with multilevel/phase signals",
1982). As it is linear, one product gives all bits from all parities.

What deviates by less than half a step comes after the `coupled` ones, and is rounded to whole steps, 2 q, each by
itself: about its middle the trellis has no zero.
"""

import math

import torch
from torch import Tensor

CHECKED, CHECKED_PARITIES = 0o515, 0o362
MEMORY = CHECKED.bit_length() - 1
STATES = 1 << MEMORY
TABLED = 16
RATE = 0.45
"""Squared error, in half steps squared, that a bit is worth: about log 4 times the error at a fine step, and more."""


def _next_state(state: int, parity: int) -> int:
    """Return the state after a number of that parity; the lowest bit of a state is s."""
    bit = state & 1
    return (state >> 1) ^ (bit * (CHECKED >> 1)) ^ (parity * (CHECKED_PARITIES >> 1))


_EDGES = sorted((_next_state(state, parity), state, parity) for state in range(STATES) for parity in (0, 1))
"""Two edges lead to each state."""

_BEFORE = torch.tensor([state for _, state, _ in _EDGES])
_BRANCH = torch.tensor([2 * (state & 1) + parity for _, state, parity in _EDGES])


def recurrence(coupled: int, count: int) -> Tensor:
    """Return the matrix M, float32 [count, count], such that parities @ M modulo 2 are the bits s, 0 if not coupled."""
    state, answer = _next_state(0, 1), [0]
    while len(answer) < count:
        answer.append(state & 1)
        state = _next_state(state, 0)
    after = torch.arange(count)[None, :] - torch.arange(count)[:, None]
    matrix = torch.tensor(answer[:count], dtype=torch.float32)[after.clamp(min=0)]
    matrix[:, coupled:] = 0
    return matrix


def half_steps(q: Tensor, matrix: Tensor) -> Tensor:
    """Return the values, float32 [B, K] in half steps, that whole numbers q, float32 [B, K], stand for."""
    second = (q.remainder(2) @ matrix).remainder(2)
    return 2 * q - second * (4 * q + 1)


def bits(deviation: Tensor, coupled: int) -> Tensor:
    """Return how many bits q = -16..15 takes, [K, 32], of a Gaussian with deviations [K] in half steps.

    A thousandth is left to a Cauchy distribution, as outliers happen.
    """
    q = torch.arange(-TABLED, TABLED, device=deviation.device, dtype=torch.float64)
    level = 2 * q + middle(deviation, coupled).double()[:, None]
    scaled = deviation.double().clamp(min=0.02)[:, None] * math.sqrt(2)
    mass = (torch.erf((level + 1) / scaled) - torch.erf((level - 1) / scaled)) / 2
    return -(0.999 * mass + 0.001 / (1 + q**2) / math.pi).log2().float()


def shrinkage(deviation: Tensor, coupled: int) -> Tensor:
    """Return by what to multiply the distance of each number from its middle, [K], so that it errs least on average.

    Of a Gaussian that deviates by little, what costs fewest bits is further from the middle than the numbers that it
    stands for. Fitted to the best shares of a teacher's logits; those of Gaussians are within 0.04 of it.
    """
    return torch.where(middle(deviation, coupled) > 0, 1 - 0.58 * torch.exp(-1.4 * deviation.square()), 1.0)


def middle(like: Tensor, coupled: int) -> Tensor:
    """Return by how much each number is more than the half steps q stands for: 1/2, or 0 of those not coupled, [K]."""
    return torch.where(torch.arange(len(like), device=like.device) < coupled, 0.5, 0.0)


def quantise(exact: Tensor, bits: Tensor, limits: Tensor, coupled: int) -> Tensor:
    """Return q, float32 [B, K], of least squared error plus RATE times bits (Viterbi's algorithm).

    exact: [B, K] in half steps, the coupled ones about -1/2; bits: [K, 32] of q = -16..15; limits: [K], the largest q
    of each. The smallest is its negative, less one of coupled ones.
    """
    symbols, costs = _branches(exact.T, bits, limits, middle(limits, coupled)[:, None])
    before, branch = _BEFORE.to(exact.device), _BRANCH.to(exact.device)
    total = exact.new_full((STATES, len(exact)), math.inf)
    total[0] = 0
    dropped = torch.empty((coupled, STATES, len(exact)), dtype=torch.bool, device=exact.device)
    for k, cost in enumerate(costs[:coupled].unbind()):
        both = (total.index_select(0, before) + cost.index_select(0, branch)).view(STATES, 2, -1)
        torch.lt(both[:, 1], both[:, 0], out=dropped[k])
        total = torch.minimum(both[:, 0], both[:, 1])
    state = total.argmin(dim=0, keepdim=True)
    taken = costs[:, :2].argmin(dim=1, keepdim=True)
    for k in range(coupled - 1, -1, -1):
        edge = 2 * state + dropped[k].gather(0, state)
        taken[k], state = branch[edge], before[edge]
    return symbols.gather(1, taken)[:, 0].T


def _branches(exact: Tensor, bits: Tensor, limits: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best q of each quantiser and parity, and its cost, both [K, 4, B], for exact values [K, B]."""
    symbols, costs = [], []
    highest = limits[:, None]
    lowest = -highest - 2 * middle
    for mirror in (1, -1):
        folded = mirror * (exact + middle) - middle
        for parity in (0, 1):
            # The largest and the smallest q of the parity.
            top, low = highest - (highest - parity).remainder(2), lowest + (lowest - parity).remainder(2)
            near = ((folded / 2 - parity) / 2).round() * 2 + parity
            far = near - torch.where(2 * near + middle > 0, 2.0, -2.0)
            candidates = [torch.maximum(torch.minimum(q, top), low) for q in (near, far)]
            scores = [_cost(folded, q, bits) for q in candidates]
            symbols.append(torch.where(scores[1] < scores[0], candidates[1], candidates[0]))
            costs.append(torch.minimum(scores[0], scores[1]))
    return torch.stack(symbols, dim=1), torch.stack(costs, dim=1)


def _cost(value: Tensor, q: Tensor, bits: Tensor) -> Tensor:
    """Return squared error plus RATE times bits of q for values, all [K, B]."""
    tabled = bits.gather(1, (q + TABLED).clamp(0, 2 * TABLED - 1).long())
    beyond = 2 * (q.abs() / (TABLED - 1)).clamp(min=1).log2()
    return (value - 2 * q).square() + RATE * (tabled + beyond)
