"""Whether a teacher's answers can be kept: each must depend on its image alone, and logits must come from a head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from logitcache.errors import LogitCacheError, RecipeError
from logitcache.runtime.device import autocast, own_randomness, to_device
from logitcache.targets import Targets
from logitcache.teacher.tap_gradients import classes_of
from logitcache.teacher.teacher import Teacher, tensors_of

PASSES = 2
"""How often each canary is answered: all in one batch, and again in other batches."""

BOUNDS: Mapping[str, float] = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference, by precision, between answers to an image in two batches, as a share of the answers' scale.

Models of torchvision and timm with random weights stay below a tenth of each on CPUs; on CUDA devices convolutions in
float32 take TF32, with the digits of float16.
"""

OFFSET = 0.1
"""The share that the size of answers has in their scale, beside how far they differ between images."""

GRADED = 4.0
"""Grad-CAM maps are sums of a forward and a backward pass that cancel: their bound is so many times larger."""

HEADS = ("fc", "head", "heads", "classifier", "last_linear")
"""Names of the layer that gives logits."""

SHOWN = 3


def examples_of(
    teachers: Sequence[Teacher], pixels: Tensor, labels: Tensor, keys: Sequence[tuple[int, int]] = ()
) -> dict[str, Targets]:
    """Let every teacher answer the canaries, uint8 [K, C, H, W], and prove that it answers each of them in any batch.

    Raises RecipeError for a teacher that cannot take them, without a head, or whose answers depend on other images, on
    random numbers or on earlier passes.
    """
    examples = {}
    for teacher in teachers:
        images, named = to_device(pixels, teacher.device), to_device(labels, teacher.device)
        examples[teacher.name] = answers_of(teacher, images, named, keys)
        if not teacher.answers_by_key:  # such answers depend on nothing but the key
            _require_head(teacher, images)
            _require_agreement(teacher, images, named, examples[teacher.name])
    return examples


def answers_of(teacher: Teacher, pixels: Tensor, labels: Tensor, keys: Sequence[tuple[int, int]] = ()) -> Targets:
    """Let a teacher answer one batch on its device. Raises RecipeError for images that its network cannot take."""
    with taking(teacher, pixels):
        return teacher(pixels, labels, keys)  # type: ignore[no-any-return]


@contextmanager
def taking(teacher: Teacher, pixels: Tensor) -> Iterator[None]:
    """Raise what a network raises within the block as RecipeError: it cannot take such pixels, uint8 [B, C, H, W]."""
    try:
        yield
    except LogitCacheError:
        raise
    except Exception as cause:  # the network's own code may raise anything
        raise RecipeError(
            f"teacher {teacher.name!r} cannot take the views, uint8 {list(pixels.shape[1:])}, in a batch of "
            f"{len(pixels)}: {cause}.\n"
            f"  Fix: end views.augmentations with the size that it takes, or choose `mode` and "
            f"teachers.{teacher.name}.preprocessing that fit it; a traced or exported program must take batches of any "
            'size: torch.export.export(…, dynamic_shapes=({0: torch.export.Dim("batch")},))'
        ) from cause


class Discrepancy(NamedTuple):
    """A target, and by how much of its scale answers to one image differ at most."""

    target: str
    share: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.share <= self.bound


def _require_agreement(teacher: Teacher, pixels: Tensor, labels: Tensor, answers: Targets) -> None:
    """Raise RecipeError unless images are answered alike in another order and other batches, one of a single image."""
    # A map must be of the class that it was of before, also if two logits are nearly equal.
    known = classes_of(labels, answers.logits) if answers.keeps_logits else labels
    order, count = torch.arange(len(pixels)).flip(0), len(pixels)
    parts = [part for part in order.tensor_split([1, 1 + count // 3]) if len(part)]
    pieces = [tensors_of(answers_of(teacher, pixels[part], known[part])) for part in parts]
    again = {name: torch.cat([piece[name] for piece in pieces]).flip(0) for name in pieces[0]}
    worst = worst_difference(teacher, tensors_of(answers), again)
    if worst.agrees:
        return
    cause, fix = _cause(teacher, pixels, known, tensors_of(answers))
    raise RecipeError(
        f"teacher {teacher.name!r} answers an image differently in another batch: {worst.target} differ by "
        f"{worst.share:.2g} of their scale, and kernels in {teacher.precision} explain {worst.bound:g}.\n"
        f"  Cause: {cause}.\n"
        f"  Fix: {fix}"
    )


def worst_difference(teacher: Teacher, first: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> Discrepancy:
    """Return the target that differs most between two answers to the same images, measured by its bound."""
    digits = "float16" if teacher.precision == "float32" and teacher.device.type == "cuda" else teacher.precision
    found = []
    for name, values in first.items():
        graded = name in teacher.features and teacher.features[name].kind == "grad_cam"
        found.append(Discrepancy(name, _share(values, again[name]), BOUNDS[digits] * (GRADED if graded else 1.0)))
    return max(found, key=lambda one: one.share / one.bound)


def _share(first: Tensor, again: Tensor) -> float:
    """Return the largest difference of a row, root mean square, as a share of the scale of all; of [K, ...] twice.

    What is not finite is left out: it is refused by the name of its image.
    """
    if first.shape != again.shape:
        return torch.inf
    one, two = first.cpu().double().flatten(1), again.cpu().double().flatten(1)
    finite = one.isfinite() & two.isfinite()
    one, two = one.where(finite, 0), two.where(finite, 0)
    scale = _size(one - one.mean(dim=0), None) + OFFSET * _size(one, None)
    return float(_size(two - one, 1).max() / scale.clamp(min=torch.finfo(torch.float32).tiny))


def _size(values: Tensor, dim: int | None) -> Tensor:
    """Return the root mean square of values, of all or of rows."""
    return values.square().mean(dim=dim).sqrt()


def _cause(teacher: Teacher, pixels: Tensor, labels: Tensor, first: Mapping[str, Tensor]) -> tuple[str, str]:
    """Find out why answers differ, by the same batch once more and by the network's modules; and what to change."""
    modules = dict(teacher.classifier.module.named_modules())
    training = [path for path, module in modules.items() if path and module.training]
    if _agree(teacher, first, tensors_of(teacher(pixels, labels))):
        normalising = [path for path, module in modules.items() if _is_of_the_batch(module)]
        if normalising:
            return (
                f"BatchNorm takes mean and variance from the batch, in {_listed(normalising)}: it has no running "
                "statistics, or is left in training mode",
                "track_running_stats=True, with weights that hold the statistics, and let eval() reach every module",
            )
        return (
            "its network computes across the images of a batch, as normalisation or attention over axis 0 does",
            "let every operation keep the images of a batch apart (F.batch_norm with running statistics and "
            "training=False; attention with batch_first=True)",
        )
    seeded = []
    for _ in range(2):
        with own_randomness(teacher.device, 0):
            seeded.append(tensors_of(teacher(pixels, labels)))
    left_on = f" (in training mode are {_listed(training)})" if training else ""
    if _agree(teacher, *seeded):
        return (
            f"its network draws random numbers, as dropout that is left on does{left_on}",
            "F.dropout(x, p, training=self.training), or nn.Dropout, and let eval() reach every module; nothing drawn "
            "in evaluation mode",
        )
    return (
        f"the same batch is answered differently in every pass: its network keeps state between passes{left_on}, or "
        "draws random numbers of its own",
        "let answers depend on the pixels alone: no counters, no memory of earlier batches, no draws",
    )


def _agree(teacher: Teacher, first: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> bool:
    return worst_difference(teacher, first, again).agrees


def _is_of_the_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:SHOWN])) + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")


def _require_head(teacher: Teacher, pixels: Tensor) -> None:
    """Raise RecipeError for a network whose logits are kept and whose head was taken off, with the feature to keep."""
    network = teacher.classifier.module
    if not teacher.answers_logits or not (_has_no_classes(network) or any(map(_passes_on, network.modules()))):
        return
    fired: list[tuple[str, Any]] = []
    with ExitStack() as hooks, torch.no_grad(), autocast(teacher.device, teacher.precision):
        for path, module in network.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(_note(fired, path)).remove)
        answers = teacher.classifier.outputs(network(teacher.classifier.normalize(pixels[:1])))
    ends = [path for path, value in fired if value is answers]
    last = [network.get_submodule(path) for path in ends]
    taken_off = any(path.split(".")[-1] in HEADS and _passes_on(one) for path, one in zip(ends, last, strict=True))
    if _has_no_classes(network) or (taken_off and not any(map(_is_linear, last))):
        tap = ends[-1] if ends else "PATH"
        raise RecipeError(
            f"teacher {teacher.name!r} has no head: the {answers.shape[1]} numbers that it returns for an image are "
            f"features, not logits.\n"
            f"  Fix: teachers.{teacher.name}: {{logits: null, features: {{embedding: {{kind: pooled, tap: {tap}}}}}}}"
        )


def _has_no_classes(network: nn.Module) -> bool:
    """Return whether a network of timm was built without a head."""
    return getattr(network, "num_classes", None) == 0


def _passes_on(module: nn.Module) -> bool:
    """Return whether a module returns its input, as in the place of a head that was taken off."""
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and len(module) == 0)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module has a matrix of its own, as the layer of a head has."""
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _note(fired: list[tuple[str, Any]], path: str) -> Any:
    return lambda module, inputs, output: fired.append((path, output))
