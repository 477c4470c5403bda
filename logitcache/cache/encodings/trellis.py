"""Trellis-coded quantisation: two interleaved quantisers, of which the parities before say which one is meant.

Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources" (1990), with the zero in both
quantisers, as in the dependent quantisation of VVC. A packing of many numbers at once is denser than that of each by
itself: the same bits give about a tenth less squared error.

In half steps the first quantiser holds 0, ±2, ±4, …, the second 0, ±1, ±3, …; `q` numbers them, 0, ±1, ±2, …. Which
of the two holds for number k is a bit s(k), a linear function, modulo 2, of the bits and the parities of `q` before:
Ungerboeck's code of 64 states for amplitude modulation, with the parity-check polynomials 103 and 024 in octal
("Channel coding with multilevel/phase signals", 1982). As it is linear, one product gives all bits from all parities.
"""

import math

import torch
from torch import Tensor

CHECKED, CHECKED_PARITIES = 0o103, 0o024
MEMORY = CHECKED.bit_length() - 1
STATES = 1 << MEMORY
TABLED = 16
RATE = 0.6
"""Squared error, in half steps squared, that a bit is worth: about log 4 times the error at a fine step, and more."""


def _next_state(state: int, parity: int) -> int:
    """Return the state after a number of that parity; the lowest bit of a state is s."""
    bit = state & 1
    return (state >> 1) ^ (bit * (CHECKED >> 1)) ^ (parity * (CHECKED_PARITIES >> 1))


_EDGES = sorted((_next_state(state, parity), state, parity) for state in range(STATES) for parity in (0, 1))
"""Two edges lead to each state."""

_BEFORE = torch.tensor([state for _, state, _ in _EDGES])
_BRANCH = torch.tensor([2 * (state & 1) + parity for _, state, parity in _EDGES])


def recurrence(count: int) -> Tensor:
    """Return the matrix M, float32 [count, count], such that the bits s are parities @ M modulo 2."""
    state, answer = _next_state(0, 1), [0]
    while len(answer) < count:
        answer.append(state & 1)
        state = _next_state(state, 0)
    after = torch.arange(count)[None, :] - torch.arange(count)[:, None]
    return torch.tensor(answer[:count], dtype=torch.float32)[after.clamp(min=0)]


def half_steps(q: Tensor, matrix: Tensor) -> Tensor:
    """Return the values, float32 [B, K] in half steps, that whole numbers q, float32 [B, K], stand for."""
    second = (q.remainder(2) @ matrix).remainder(2)
    return 2 * q - q.sign() * second


def bits(deviation: Tensor) -> Tensor:
    """Return how many bits |q| = 0..15 takes, [K, 16], of a Gaussian with deviations [K] in half steps.

    A thousandth is left to a Cauchy distribution, as outliers happen. An entropy coder does not know which quantiser is
    meant: the bits are those of the mean of both probabilities.
    """
    q = torch.arange(TABLED + 1, device=deviation.device, dtype=torch.float64)
    scaled = deviation.double().clamp(min=0.02)[:, None] * math.sqrt(2)
    probability = 0.001 / (1 + q[:-1] ** 2) / math.pi + torch.zeros_like(scaled)
    for second in (0, 1):
        level = 2 * q - second * q.sign()
        upper = torch.erf((level[:-1] + level[1:]) / 2 / scaled)
        mass = torch.diff(upper, dim=1, prepend=torch.zeros_like(upper[:, :1])) / 2
        mass[:, 0] *= 2
        probability += 0.4995 * mass
    return -probability.log2().float()


def quantise(exact: Tensor, bits: Tensor, limits: Tensor) -> Tensor:
    """Return q, float32 [B, K], of least squared error plus RATE times bits (Viterbi's algorithm).

    exact: [B, K] in half steps; bits: [K, 16] of each |q|; limits: [K], the largest |q| of each.
    """
    symbols, costs = _branches(exact.T, bits, limits)
    before, branch = _BEFORE.to(exact.device), _BRANCH.to(exact.device)
    total = exact.new_full((STATES, len(exact)), math.inf)
    total[0] = 0
    dropped = torch.empty((len(costs), STATES, len(exact)), dtype=torch.bool, device=exact.device)
    for k, cost in enumerate(costs.unbind()):
        both = (total.index_select(0, before) + cost.index_select(0, branch)).view(STATES, 2, -1)
        torch.lt(both[:, 1], both[:, 0], out=dropped[k])
        total = torch.minimum(both[:, 0], both[:, 1])
    state = total.argmin(dim=0, keepdim=True)
    taken = torch.empty((len(costs), 1, len(exact)), dtype=torch.long, device=exact.device)
    for k in range(len(costs) - 1, -1, -1):
        edge = 2 * state + dropped[k].gather(0, state)
        taken[k], state = branch[edge], before[edge]
    return symbols.gather(1, taken)[:, 0].T


def _branches(exact: Tensor, bits: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best q of each quantiser and parity, and its cost, both [K, 4, B], for exact values [K, B]."""
    symbols, costs = [], []
    limit = limits[:, None]
    sign, size = torch.where(exact < 0, -1.0, 1.0), exact.abs()
    for second in (0, 1):
        nearest = ((size + second) / 2).round()
        inner, outer = nearest - 1, nearest + 1
        for parity in (0, 1):
            at_nearest = nearest.remainder(2) == parity
            near = torch.where(at_nearest, nearest, inner.abs())
            far = torch.where(at_nearest, (nearest - 2).clamp(min=parity), outer)
            # The largest q of the parity.
            top = limit - (limit - parity).remainder(2)
            candidates = [torch.minimum(near, top), torch.minimum(far, top)]
            scores = [_cost(size, q, second, bits) for q in candidates]
            symbols.append(sign * torch.where(scores[1] < scores[0], candidates[1], candidates[0]))
            costs.append(torch.minimum(scores[0], scores[1]))
    return torch.stack(symbols, dim=1), torch.stack(costs, dim=1)


def _cost(size: Tensor, q: Tensor, second: int, bits: Tensor) -> Tensor:
    """Return squared error plus RATE times bits of q >= 0 for sizes, all [K, B]."""
    level = 2 * q - second * q.sign()
    rate = bits.gather(1, q.clamp(max=TABLED - 1).long()) + 2 * (q / (TABLED - 1)).clamp(min=1).log2()
    return (size - level).square() + RATE * rate
