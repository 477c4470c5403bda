"""What is trained beside the student: built from shapes, kept over a stop, saved apart, no part of the student."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from logitcache.errors import LogitCacheError, RecipeError, Stopped
from logitcache.models import SmallCNN
from logitcache.reductions import FeatureShape
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student import build_model, compatibility, lesson
from logitcache.student.adapters import PlaceMap, matched, num_channels, perceptron, unit
from logitcache.student.learner import Learner
from logitcache.student.losses import CKA, RKD, SRRL, AttentionTransfer, CrossEntropy, GradCAM, KLDivergence
from logitcache.student.losses.base import HeldTeacher
from logitcache.student.training import train
from logitcache.student.training_data import open_training_data
from tests.student.featured import LOSSES, MAPS, VECTORS, fill_featured
from tests.student.small import GREY, IMAGES, LINEAR, fill, metrics, network, recipe, recorded_losses, student, weights

BY_ROW = [{"kind": "hint", **MAPS}, {"kind": "vid", **VECTORS}, {"kind": "attention_transfer", **MAPS}]
SGD = {"kind": "sgd", "lr": 0.02}
SHAPES = {
    "maps": FeatureShape("maps", (8, 7, 7)),
    "pooled": FeatureShape("pooled", (8,)),
    "attention": FeatureShape("attention", (7, 7)),
    "cam": FeatureShape("grad_cam", (7, 7)),
}


# Shapes.


@pytest.mark.parametrize(
    ("given", "wanted", "places"),
    [
        ((4, 8, 8), (6, 4, 4), (16, 4, 6)),
        ((4, 2, 2), (6, 4, 4), (16, 4, 6)),
        ((4, 8, 8), (6,), (1, 4, 6)),
        ((4,), (6,), (1, 4, 6)),
        ((17, 4), (17, 6), (17, 4, 6)),
        ((16, 4), (17, 6), (16, 4, 6)),
        ((4, 8, 8), (17, 6), (16, 4, 6)),
        ((17, 4), (6, 2, 2), (4, 4, 6)),
    ],
)
def test_features_are_brought_to_the_same_places(
    given: tuple[int, ...], wanted: tuple[int, ...], places: tuple[int, int, int]
) -> None:
    pair = matched(torch.randn(3, *given), torch.randn(3, *wanted))
    assert pair.student.shape == (3, places[0], places[1])
    assert pair.teacher.shape == (3, places[0], places[2])
    assert num_channels(given, wanted) == places[1:]


@pytest.mark.parametrize(("given", "wanted"), [((4,), (6, 2, 2)), ((11, 4), (6, 2, 2)), ((4, 2, 2), (7, 4))])
def test_features_without_common_places_are_refused(given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="Fix"):
        num_channels(given, wanted)
    with pytest.raises(RecipeError, match="Fix"):
        PlaceMap(given, FeatureShape("maps", wanted))


def test_a_projection_of_places_is_a_convolution_of_maps() -> None:
    maps = torch.randn(2, 4, 5, 5)
    network = perceptron([4, 6, 6, 3])
    found = network(matched(maps, torch.randn(2, 3, 5, 5)).student)
    expected = maps
    for layer in (0, 2, 4):
        expected = torch.relu(expected) if layer else expected
        expected = torch.nn.functional.conv2d(expected, network[layer].weight[:, :, None, None])
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))


def test_directions_of_nothing_are_nothing_and_have_a_bounded_gradient() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    found = unit(vectors)
    found.sum().backward()
    assert found.tolist() == [[0.0, 0.0], pytest.approx([0.6, 0.8])]
    assert vectors.grad is not None
    assert vectors.grad.abs().max() <= 1


# In training.


@pytest.fixture(scope="module")
def featured(caches: Path) -> Path:
    return fill_featured(caches / "featured")


def _adapters(run: Path | str) -> dict[str, Tensor]:
    return load_file(Path(run, "adapters.safetensors"))


def test_all_losses_on_features_train_together(featured: Path, tmp_path: Path) -> None:
    with recorded_losses() as terms:
        result = train(student(tmp_path / "run", featured, losses=LOSSES, epochs=4, batch_size=20))
    values = np.array(terms)
    assert values.shape == (40, len(LOSSES))
    assert np.isfinite(values).all()
    # The last is contrastive: what it has seen is noise at first, and easily told apart.
    assert (values[-10:, :-1].mean(axis=0) < values[:10, :-1].mean(axis=0)).all()
    plain = SmallCNN(width=4).build(10, 1).module.state_dict()
    assert load_file(Path(result.out, "weights.safetensors")).keys() == plain.keys()


def test_what_was_trained_beside_the_student_is_saved_apart(featured: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", featured, losses=LOSSES, epochs=1))
    saved = _adapters(result.out)
    assert {name.partition(".")[0] for name in saved} == {"1", "2", "9", "10"}
    assert saved["1.weight"].shape == (8, 8)
    assert "10.seen_student" not in saved
    plain = train(student(tmp_path / "plain", featured, losses=[LOSSES[0], LOSSES[3]], epochs=1))
    assert not Path(plain.out, "adapters.safetensors").exists()


def test_the_parameters_of_adapters_learn_and_do_not_count_as_the_students(featured: Path, tmp_path: Path) -> None:
    entry = student(tmp_path / "run", featured, losses=[{"kind": "hint", **MAPS}], epochs=1)
    learner = _learner(entry)
    first = {name: value.clone() for name, value in learner.adapters.named_parameters()}
    result = train(entry)
    saved = _adapters(result.out)
    assert saved.keys() == first.keys() == {"0.weight", "0.bias"}
    assert all(not torch.equal(saved[name], first[name]) for name in first)
    assert result.num_parameters == sum(p.numel() for p in SmallCNN(width=4).build(10, 1).module.parameters())


def _learner(entry: Any) -> Learner:
    """A learner as training would build it."""
    torch.manual_seed(entry.seed)
    site = open_training_data(entry).lesson(entry)
    classifier = build_model.build_classifier(entry, site, None)
    return Learner(entry, classifier, torch.device("cpu"), build_model.build_adapters(entry, site, classifier))


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": LOSSES, "ema": 0.8},
        {"losses": [*BY_ROW, LOSSES[-1]], "micro_batches": 3, "clip_norm": 0.5, "optimizer": SGD},
        {"losses": LOSSES, "precision": "bfloat16"},
        {"losses": LOSSES, "precision": "float16"},
    ],
    ids=["every loss", "micro batches", "bfloat16", "float16"],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    featured: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(student(tmp_path / "whole", featured, **changes))
    entry = student(tmp_path / "run", featured, **changes)
    _stop_after(entry, 4)
    _stop_after(entry, 5, resume=True)
    resumed = train(entry, resume=True)
    assert weights(resumed) == weights(whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    found, expected = _adapters(resumed.out), _adapters(whole.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _stop_after(entry: Any, call: int, resume: bool = False) -> None:
    zero_grad, calls = torch.optim.Optimizer.zero_grad, 0

    def counted(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGTERM)
        zero_grad(self, set_to_none)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", counted)
        with pytest.raises(Stopped):
            train(entry, resume=resume)


def test_micro_batches_train_as_the_whole_batch_does(featured: Path, tmp_path: Path) -> None:
    losses = [
        {"kind": "cross_entropy"},
        {"kind": "hint", "student": "2", "feature": "penultimate"},
        {"kind": "vid", "student": "0", "feature": "maps"},
    ]
    changes = {"model": LINEAR, "losses": losses, "optimizer": SGD, "epochs": 1}
    whole = train(student(tmp_path / "whole", featured, **changes))
    parts = train(student(tmp_path / "parts", featured, micro_batches=5, **changes))
    for file in ("weights.safetensors", "adapters.safetensors"):
        first, second = (load_file(Path(run.out, file)) for run in (whole, parts))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_a_compiled_student_gives_the_same_features(
    featured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend="eager", **options))
    losses = [loss for loss in LOSSES if loss["kind"] != "grad_cam"]
    changes = {"losses": losses, "epochs": 1, "ema": 0.9, "optimizer": SGD}
    with recorded_losses() as eager:
        plain = train(student(tmp_path / "plain", featured, **changes))
    with recorded_losses() as terms:
        result = train(student(tmp_path / "run", featured, compile=True, **changes))
    np.testing.assert_allclose(terms, eager, rtol=1e-4)
    names = [load_file(Path(run.out, "weights.safetensors")).keys() for run in (plain, result)]
    assert names[0] == names[1]


def test_gradients_inside_a_compiled_model_are_refused(featured: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"\['grad_cam'\] take gradients inside the model.*leave out compile"):
        student(tmp_path / "run", featured, losses=[LOSSES[4]], compile=True)


def test_losses_that_compare_rows_are_refused_with_micro_batches(featured: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"\['similarity', 'rkd', 'pkt', 'cka'\] compare the rows"):
        student(tmp_path / "run", featured, losses=LOSSES, micro_batches=2)


def test_the_average_takes_neither_taps_nor_adapters(featured: Path, tmp_path: Path) -> None:
    learner = _learner(student(tmp_path / "run", featured, losses=LOSSES, ema=0.9))
    assert learner.ema is not None
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in learner.ema.modules()]
    assert not any(hooks)
    assert learner.measured.state_dict().keys() == learner.model.state_dict().keys()


def test_an_adapter_that_is_no_longer_finite_is_seen(featured: Path, tmp_path: Path) -> None:
    learner = _learner(student(tmp_path / "run", featured, losses=LOSSES[:2]))
    assert learner.finite()
    with torch.no_grad():
        next(learner.adapters.parameters()).fill_(torch.nan)
    assert not learner.finite()


def test_looking_for_shapes_moves_nothing(featured: Path, tmp_path: Path) -> None:
    entry = student(tmp_path / "run", featured, losses=[LOSSES[3]])
    site = open_training_data(entry).lesson(entry)
    classifier = build_model.build_classifier(entry, site, None)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    generator = torch.get_rng_state()
    build_model.build_adapters(entry, site, classifier)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not any(len(module._forward_hooks) for module in classifier.modules())


def test_losses_on_logits_train_as_they_did_beside_losses_without_parameters(featured: Path, tmp_path: Path) -> None:
    """What is built for a loss that weighs next to nothing leaves the student's first weights as they are."""
    alone = train(student(tmp_path / "alone", featured, optimizer=SGD, epochs=1))
    losses = [{"kind": "kl_divergence"}, {"kind": "hint", **MAPS, "weight": 1e-40}]
    beside = train(student(tmp_path / "beside", featured, optimizer=SGD, epochs=1, losses=losses))
    assert weights(alone) == weights(beside)


def test_features_come_from_a_teacher_of_other_classes_or_of_none() -> None:
    rkd, srrl = RKD(student="0", feature="f"), SRRL(student="0", feature="f")
    assert lesson._num_classes([CrossEntropy(), rkd, srrl], {"net": 10}, 3) == 3
    assert lesson._num_classes([CrossEntropy(), rkd], {}, 3) == 3
    assert lesson._num_classes([rkd, KLDivergence()], {"net": 10}, 3) == 10
    assert lesson._num_classes([rkd], {"net": 10}, None) == 10
    with pytest.raises(RecipeError, match="the number of classes is unknown"):
        lesson._num_classes([rkd], {}, None)


# Refusals.


def _refused(entry: Any, match: str) -> str:
    with recorded_losses() as terms, pytest.raises(LogitCacheError, match=match) as refused:
        train(entry)
    assert terms == []
    assert not Path(entry.out).exists()
    return str(refused.value)


def test_a_wrong_tap_is_refused_with_the_names_there_are(featured: Path, tmp_path: Path) -> None:
    entry = student(tmp_path / "run", featured, losses=[{"kind": "hint", "student": "0.44", "feature": "maps"}])
    message = _refused(entry, "the model has no module '0.44'")
    assert "Did you mean '0.4'" in message
    assert "0.4.body.0" in message


def test_a_tap_without_places_is_refused_beside_maps(featured: Path, tmp_path: Path) -> None:
    entry = student(tmp_path / "run", featured, losses=[LOSSES[0], {**BY_ROW[0], "student": "3:input"}])
    _refused(entry, r"losses\.1 \(hint\): a feature of shape \[8\] has no places\. Fix")


def test_a_feature_that_the_cache_does_not_keep_is_refused_with_the_line_that_adds_it(
    cache: Path, tmp_path: Path
) -> None:
    rkd = {"kind": "rkd", "student": "0", "feature": "mine"}
    entry = student(tmp_path / "run", cache, losses=[{"kind": "kl_divergence"}, rkd])
    message = _refused(entry, r"losses\.1 \(rkd\) needs feature 'mine' of 'net', the cache keeps none")
    assert str(cache) in message
    line = "teachers.net.features.mine: {kind: pooled, tap: …}; the same command then adds it"
    assert f"add to the precompute recipe: {line}" in message
    assert "losses.0" not in message


def test_what_is_missing_of_a_teacher_is_said_feature_by_feature() -> None:
    held = HeldTeacher(10, SHAPES)

    def reasons(loss: Any) -> list[str]:
        return list(compatibility.unkept_features(loss, "net", held))

    assert reasons(AttentionTransfer(student="0", feature="attention")) == []
    assert reasons(AttentionTransfer(student="0", feature="maps")) == []
    (kind,) = reasons(GradCAM(student="0", feature="maps"))
    assert kind.startswith("needs grad_cam, feature 'maps' of 'net' is kept as maps. Fix: keep another beside it")
    assert "teachers.net.features.maps_grad_cam: {kind: grad_cam, tap: …}" in kind
    (other,) = reasons(CKA(student="0", feature="missing"))
    assert "the cache keeps ['attention', 'cam', 'maps', 'pooled']" in other
    head, its_input = reasons(SRRL(student="0", feature="pooled"))
    assert "needs the last linear layer of 'net'; the cache does not keep it" in head
    assert "teachers.net.logits: {kind: head}" in head
    assert "kept as 'penultimate', not as 'pooled'. Fix: set `feature: penultimate`" in its_input
    (one,) = reasons(SRRL(student="0", feature="penultimate"))  # which comes with the head
    assert "teachers.net.logits: {kind: head}" in one
    assert reasons(SRRL(student="0", feature="pooled", logit_weight=0.0)) == []
    for loss in (SRRL(student="0", feature="penultimate", logit_weight=0.0), CKA(student="0", feature="penultimate")):
        (head,) = reasons(loss)
        assert "needs 'penultimate', what the last linear layer of 'net' takes in; the cache does not keep it" in head
        assert head.endswith("Fix: precompute with teachers.net.logits: {kind: head}, which keeps it")
    (places,) = reasons(AttentionTransfer(student="0", feature="penultimate"))  # a vector has none
    assert "teachers.net.features.penultimate: {kind: attention, tap: …}" in places


def test_a_head_that_is_not_kept_is_the_one_thing_to_mend(top_k: Path, tmp_path: Path) -> None:
    losses = [{"kind": "srrl", **VECTORS}]
    with pytest.raises(RecipeError) as refused:
        train(student(tmp_path / "run", top_k, losses=losses))
    assert str(refused.value).count("Fix: ") == 1
    assert "teachers.net.logits: {kind: head}" in str(refused.value)


def test_the_last_layer_of_a_teacher_takes_its_own_input_alone(featured: Path, tmp_path: Path) -> None:
    """Other features as wide as the layer would train on noise."""
    held = HeldTeacher(10, SHAPES | {"penultimate": SHAPES["pooled"]}, (torch.zeros(10, 8), torch.zeros(10)))
    assert list(compatibility.unkept_features(SRRL(student="0", feature="penultimate"), "net", held)) == []
    entry = student(tmp_path / "run", featured, losses=[{"kind": "srrl", **MAPS}])
    _refused(entry, r"losses\.0 \(srrl\) needs what the last linear layer of 'net' takes in.*feature: penultimate")


def test_features_of_mixtures_of_answers_are_refused(tmp_path: Path) -> None:
    views = {"num_views": 2, "mixing": [{"kind": "mixup"}], "targets": "linear"}
    linear = fill(tmp_path / "cache", views=views)
    entry = student(tmp_path / "run", linear, losses=[{"kind": "rkd", **VECTORS}])
    _refused(entry, r"losses\.0 \(rkd\) needs features, the cache mixes the answers to two images")


def test_a_teacher_of_features_alone_teaches_what_labels_do_not_say(tmp_path: Path) -> None:
    features = {"pooled": {"kind": "pooled", "tap": "0"}}
    kept = {"preprocessing": GREY.model_dump(mode="json"), "logits": None, "features": features}
    entries = {"cache": str(tmp_path / "cache"), "dataset": IMAGES, "teachers": {"net": kept}, "device": "cpu"}
    precompute(recipe(PrecomputeRecipe, **entries, num_workers=0), teachers={"net": network()})
    losses = [{"kind": "cross_entropy"}, {"kind": "rkd", "student": "0", "feature": "pooled"}]
    result = train(student(tmp_path / "run", tmp_path / "cache", losses=losses, epochs=1))
    assert load_file(Path(result.out, "weights.safetensors"))["3.weight"].shape == (10, 8)
    wrong = student(tmp_path / "wrong", tmp_path / "cache", losses=[{"kind": "kl_divergence"}])
    _refused(wrong, r"losses\.0 \(kl_divergence\) needs logits, the cache keeps features of 'net' alone")


def test_features_of_one_teacher_and_logits_of_another_train_together(tmp_path: Path) -> None:
    cache = fill_featured(tmp_path / "cache", teachers={"first": network(1), "second": network(2)})
    losses = [{"kind": "kl_divergence", "teacher": "second"}, {"kind": "hint", **MAPS, "teacher": "first"}]
    whole = train(student(tmp_path / "run", cache, losses=losses, epochs=1))
    other = train(student(tmp_path / "other", cache, losses=[losses[0], losses[1] | {"teacher": "second"}], epochs=1))
    assert np.isfinite([whole.loss, other.loss]).all()
    assert weights(whole) != weights(other)
    nobody = student(tmp_path / "nobody", cache, losses=[losses[0], {"kind": "hint", **MAPS}])
    _refused(nobody, r"losses\.1 \(hint\) names no teacher, the cache has \['first', 'second'\]")
