"""Prune a run's network, and train what is left from the same cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from logitcache.config.recipe import load_recipe, read_recipe
from logitcache.errors import RecipeError
from logitcache.models import Classifier, Pruned, Run, resolve_preprocessing
from logitcache.models.pruning.pruned import LAYERS
from logitcache.runtime.console import logger
from logitcache.runtime.device import own_randomness, resolve_device
from logitcache.shipping.fine_tuning import evaluated_size, fine_tuning_recipe
from logitcache.student.evaluation.cost import Contender, LatencyPlan, count_flops, count_parameters, latencies
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.run_result import RunResult
from logitcache.student.runs.trained import load_student
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe

_SEARCH_STEPS = 4
_TIMING = LatencyPlan(batch_sizes=(8,), warm_up=3, repeats=15)


@dataclass(frozen=True)
class PruneResult:
    """A pruned and fine-tuned student beside its parent.

    `flops` are the operations for one image, of which a multiplication and its addition are two. `zeros` is the share
    of the weights of convolutions and linear layers that are zero. The parent's `top1` is that of its kept epoch.
    """

    parent: str
    flops: int
    flops_of_parent: int
    num_parameters_of_parent: int
    zeros: float
    top1_of_parent: float | None
    run: RunResult


def prune(
    run: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    macs: float | None = None,
    latency: float | None = None,
    sparsity: float | None = None,
    unpruned: Sequence[str] = (),
    round_to: int = 8,
    resume: bool = False,
) -> PruneResult:
    """Prune a run's network and fine-tune it with the run's own recipe, into the folder `out`.

    Give one target: a share of the parent's multiply-adds (`macs`) or of its time (`latency`, measured here with
    batches of 8) by removing channels, or a share of weights to set to zero (`sparsity`). `overrides` change the
    recipe, such as epochs=5. A stopped run continues with `resume`, to the same bytes. Raises RecipeError for a network
    that cannot be pruned, and as training.
    """
    run = Path(run)
    entry = {
        "kind": "pruned",
        "input_size": list(evaluated_size(run)),
        "unpruned": list(unpruned),
        "round_to": round_to,
        "sparsity": sparsity,
    }
    if latency is not None:
        any_share = fine_tuning_recipe(run, out, entry | {"macs": latency}, overrides)
        macs = _begun_with(Path(out), resume) or _macs_for(latency, any_share)
    recipe = fine_tuning_recipe(run, out, entry | {"macs": macs}, overrides)
    assert isinstance(recipe.model, Pruned), "it is the entry of this function"
    parent, image = _parent(recipe.model), _black(recipe.model)
    measured = RunDirectory(recipe.model.path).finished(RunResult)
    result = train(recipe, resume=resume)
    student = load_student(result.out, factory=recipe.model.factory, trust=recipe.model.trust).classifier
    weights = [part.weight for part in student.modules() if isinstance(part, LAYERS)]
    return PruneResult(
        parent=recipe.model.path,
        flops=count_flops(student, image),
        flops_of_parent=count_flops(parent, image),
        num_parameters_of_parent=count_parameters(parent),
        zeros=sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
        top1_of_parent=None if measured is None else measured.top1,
        run=result,
    )


def _begun_with(out: Path, resume: bool) -> float | None:
    """Return the share of multiply-adds that was chosen when a run to resume began; None if there is none."""
    path = out / "recipe.yaml"
    if not (resume and path.exists()):
        return None
    model = load_recipe(path, StudentRecipe if "cache" in read_recipe(path) else TeacherRecipe).model
    return model.macs if isinstance(model, Pruned) else None


def _macs_for(latency: float, recipe: TrainingRecipe) -> float:
    """Search the largest share of multiply-adds that takes at most a share of the parent's time, by bisection."""
    assert isinstance(recipe.model, Pruned), "it is the entry of `prune`"
    device = resolve_device(recipe.device)
    least, most, found = 0.0, 1.0, None
    for step in range(1 + _SEARCH_STEPS):
        macs = latency if step == 0 else (least + most) / 2
        model = recipe.model.model_copy(update={"macs": macs})
        pruned, parent = (Contender(each.to(device), recipe.precision) for each in (_built(model), _parent(model)))
        _, timed = latencies(pruned, {"parent": parent}, _black(model).to(device), _TIMING)
        assert timed.speed_up is not None, "it is the row of the parent"
        share = 1 / timed.speed_up
        logger.info(f"{macs:.2f} of the multiply-adds take {share:.2f} of the time")
        if share <= latency:
            least, found = macs, macs
        else:
            most = macs
    if found is None:
        raise RecipeError(
            f"no share of the channels of {recipe.model.path} takes at most {latency} of its time on this machine.\n"
            "  Fix: a larger `latency`, or a target of multiply-adds: macs"
        )
    return found


def _built(model: Pruned | Run) -> Classifier:
    """Build a network with its weights, in evaluation mode."""
    stored = model.stored()
    with own_randomness(torch.device("cpu"), 0):
        built = model.build(stored.num_classes, stored.in_channels)
    return Classifier(built.module, resolve_preprocessing(built, None, who=model.path)).eval()


def _parent(model: Pruned) -> Classifier:
    return _built(Run(path=model.path, factory=model.factory, trust=model.trust))


def _black(model: Pruned) -> Tensor:
    """Return an image of the size at which the run is evaluated, uint8 [C, H, W]."""
    stored = model.stored()
    assert model.input_size is not None, "`prune` sets it"
    return torch.zeros((stored.in_channels, *model.input_size), dtype=torch.uint8)
