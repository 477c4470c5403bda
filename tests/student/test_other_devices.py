"""Training steps and encodings on devices other than the CPU, without one.

Tensors on the meta device have no values: whatever reads one on the host (`item`, `nonzero`, `bool`, a copy to the
CPU) raises there, as mixing devices does. A step that runs there waits for no GPU.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.features import Feature
from logitcache.cache.encodings.head import HeadForm
from logitcache.cache.encodings.measure import divergences
from logitcache.cache.encodings.top_k import PackedTopK, TopK
from logitcache.cache.encodings.transform import Transform
from logitcache.cache.encodings.uint8 import UInt8
from logitcache.config.recipe import load_recipe
from logitcache.logits import log_probs, mapped
from logitcache.runtime.device import OwnRandomness
from logitcache.student.build_model import black, build_adapters, build_classifier, decide_layouts
from logitcache.student.evaluation import single_label
from logitcache.student.learner import Learner
from logitcache.student.losses import BinaryCrossEntropy
from logitcache.student.losses.base import Context
from logitcache.student.losses.binary_cross_entropy import PositiveWeights
from logitcache.student.optim.schedules import Progress
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.training_run import TrainingRun
from logitcache.student.training_data import open_training_data
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.targets import Batch, Targets
from logitcache.teacher.encoding import relative_error
from logitcache.teacher.teacher import TeacherSource, build_teacher
from logitcache.views.augmentations import (
    CenterCrop,
    HorizontalFlip,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Resize,
)
from logitcache.views.keys import ViewKey
from logitcache.views.mixing.mixing import CutMix, MixUp
from logitcache.views.resident import ResidentViews, may_stay
from logitcache.views.spec import Views, ViewSpec
from tests.cache.test_transform import NUM_CLASSES, teacher_logits
from tests.student.featured import LOSSES, fill_featured
from tests.student.small import fill, network, student, teacher
from tests.teacher.nets import FEATURES, SIDE, Net, keeping
from tests.views.images import Images, textured

META = torch.device("meta")
ON_LOGITS = [
    {"kind": kind, "temperature": 2.0} for kind in ("kl_divergence", "dkd", "nkd", "wsld", "dist", "multi_label_kl")
]
BY_ROW = [loss for loss in LOSSES if loss["kind"] in ("cross_entropy", "hint", "vid", "attention_transfer", "srrl")]
ON_LOGITS += [{"kind": "mean_squared_error"}, {"kind": "cross_entropy"}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_featured(tmp_path_factory.mktemp("featured") / "c.zarr")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two teachers, of which top-k is kept."""
    path = tmp_path_factory.mktemp("two") / "c.zarr"
    return fill(path, {"a": network(1), "b": network(2)}, {"kind": "top_k", "k": 3})


ENSEMBLES = {kind: {"kind": kind} for kind in ("mean", "by_confidence", "by_entropy")}
ON_ENSEMBLES = [{"kind": "kl_divergence", "teacher": name, "temperature": 2.0} for name in ENSEMBLES]


@pytest.fixture(autouse=True)
def _no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast do nothing on the meta device, which has none."""
    real = torch.autocast

    def autocast(device_type: str, *arguments: Any, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else real(device_type, *arguments, **options)

    monkeypatch.setattr(torch, "autocast", autocast)


def begin(recipe: StudentRecipe | TeacherRecipe, device: torch.device) -> tuple[TrainingRun, Any]:
    """Build what `train` builds on a device, and the batches of its first epoch there."""
    data = open_training_data(recipe)
    lesson, stream = data.lesson(recipe), data.stream([recipe])
    classifier = build_classifier(recipe, lesson, None, None)
    layouts = decide_layouts(recipe, classifier, black(lesson))
    adapters = build_adapters(recipe, lesson, classifier, layouts)
    learner = Learner(recipe, classifier, device, adapters, layouts=layouts)
    directory: Any = RunDirectory(recipe.out)
    unused: Any = None
    run = TrainingRun(recipe, learner, OwnRandomness(device, 0), directory, stream, unused, unused, unused)
    return run, stream.batches(device, 0)


CHANGES: dict[str, dict[str, Any]] = {
    "clipped and averaged": {"clip_norm": 1.0, "ema": 0.99},
    "micro-batches": {"micro_batches": 2, "losses": BY_ROW},
    "sgd": {"optimizer": {"kind": "sgd", "lr": 0.1}},
    "channels last": {"channels_last": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_step_of_a_student_reads_nothing_on_the_host(tmp_path: Path, cache: Path, change: dict[str, Any]) -> None:
    run, batches = begin(student(tmp_path / "run", cache, **({"losses": LOSSES} | change)), META)
    for _ in range(2):
        run.step(next(batches))
    assert run.learner.step == 2
    assert {parameter.device for parameter in run.learner.trained.parameters()} == {META}


@pytest.mark.parametrize("loss", ON_LOGITS, ids=lambda loss: loss["kind"])
def test_every_loss_on_logits_reads_nothing_on_the_host(tmp_path: Path, cache: Path, loss: dict[str, Any]) -> None:
    run, batches = begin(student(tmp_path / "run", cache, losses=[loss]), META)
    run.step(next(batches))
    assert run.learner.sums.device == META


def test_a_step_on_labels_reads_nothing_on_the_host(tmp_path: Path) -> None:
    run, batches = begin(teacher(tmp_path / "run"), META)
    run.step(next(batches))
    assert run.learner.step == 1


def test_binary_cross_entropy_reads_nothing_on_the_host() -> None:
    logits = torch.empty(4, 6, device=META, requires_grad=True)
    labels = torch.zeros(4, 6, dtype=torch.int8, device=META)
    batch = Batch(torch.empty(4, 1, 1, 1, dtype=torch.uint8, device=META), labels, torch.empty(4, 2, device=META), {})
    loss = BinaryCrossEntropy()
    context = Context(PositiveWeights((2.0,)).to(META), Progress(0, 1, 1))
    (loss(Targets(logits), batch, context) * loss.rows(batch)).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None


def test_a_temperature_that_moves_reads_nothing_on_the_host(tmp_path: Path, cache: Path) -> None:
    loss = {
        "kind": "kl_divergence",
        "temperature": {"kind": "dynamic", "start": 2.0, "step": 0.25, "margin": 0.5, "min": 1.0, "max": 3.0},
    }
    run, batches = begin(student(tmp_path / "run", cache, losses=[loss]), META)
    run.step(next(batches))
    assert run.learner.step == 1


def test_measuring_computes_on_the_device_what_it_copies_once_a_batch(tmp_path: Path, cache: Path) -> None:
    run, batches = begin(student(tmp_path / "run", cache, losses=LOSSES), META)
    batch = next(batches)
    with torch.no_grad():
        logits = run.learner.measured.eval()(batch.images).float()
    found = single_label._of_rows(logits, batch.labels, batch.teachers)
    assert found.device == META
    assert found.shape == (8, len(batch))


def test_measuring_ensembles_computes_on_the_device(tmp_path: Path, two: Path) -> None:
    run, batches = begin(student(tmp_path / "run", two, ensembles=ENSEMBLES, losses=ON_ENSEMBLES), META)
    batch = next(batches)
    assert {*batch.teachers} == {"a", "b", *ENSEMBLES}
    logits = run.learner.measured.eval()(batch.images)
    assert single_label._of_rows(logits, batch.labels, batch.teachers).device == META


def test_ensembles_are_weighed_on_the_device(tmp_path: Path, two: Path) -> None:
    run, batches = begin(student(tmp_path / "run", two, ensembles=ENSEMBLES, losses=ON_ENSEMBLES), META)
    run.step(next(batches))
    assert run.learner.step == 1


AUGMENTED: list[Any] = [
    [RandomCrop(size=20, padding=3, padding_mode="reflect"), HorizontalFlip(), RandomErasing(value="noise")],
    [RandomCrop(size=16, padding=2, padding_mode="symmetric"), RandomErasing(value=7)],
    [RandomResizedCrop(size=24, kernel="exact", interpolation="bicubic"), CenterCrop(size=20)],
    [Resize(size=24, kernel="exact"), RandomCrop(size=22, padding=1, padding_mode="edge", fill=0)],
]


@pytest.mark.parametrize("mixing", [(), (MixUp(p=0.5), CutMix(p=0.5))], ids=["plain", "mixed"])
@pytest.mark.parametrize("augmentations", AUGMENTED, ids=range(len(AUGMENTED)))
def test_views_are_augmented_and_mixed_on_the_device(augmentations: Any, mixing: Any) -> None:
    spec = ViewSpec(num_views=2, augmentations=tuple(augmentations), mixing=mixing)
    views = Views(Images(textured(12, 20, 20)), spec)
    assert may_stay(views, torch.device("cpu"))
    keys = [ViewKey(index % 2, index) for index in range(12)]
    [found] = ResidentViews(views, META).render([keys])
    assert (found.device, found.dtype, found.shape) == (META, torch.uint8, views.__getitems__(keys).shape)


@pytest.mark.parametrize("form", [Dense(), TopK(k=3), PackedTopK(k=3), UInt8()], ids=lambda form: form.kind)
def test_an_encoding_encodes_and_decodes_on_the_device(form: Any) -> None:
    codec = form.fitted(None)
    rows = codec.encode(torch.empty(4, 20, device=META))
    assert {values.device for values in rows.values()} == {META}
    assert {row.suffix for row in codec.arrays(20)} == set(rows)
    decoded = log_probs(codec.decode(rows, 20), 2.0)
    assert decoded.device == META
    assert decoded.shape == (4, 20)


FITTED_FEATURES = [
    Feature(kind="maps", tap="x", dtype="int8"),
    Feature(kind="maps", tap="x", dtype="int8", channels=3),
    Feature(kind="maps", tap="x", channels=3),
    Feature(kind="pooled", tap="x"),
    Feature(kind="attention", tap="x", dtype="int8"),
]


@pytest.mark.parametrize("feature", FITTED_FEATURES, ids=lambda one: f"{one.kind} {one.dtype} {one.channels}")
def test_a_feature_is_encoded_and_decoded_on_the_device(feature: Feature) -> None:
    shape = {"maps": (6, 4, 4), "pooled": (6,), "attention": (4, 4)}[feature.kind]
    codec = feature.fitted(lambda: torch.randn(20, 6), shape)
    rows = codec.encode(torch.empty(5, *shape, device=META))
    assert {values.device for values in rows.values()} == {META}
    error = relative_error(codec.decode(rows), torch.empty(5, *shape, device=META))
    assert (error.device, error.shape) == (META, (5,))


def test_a_head_is_decoded_on_the_device() -> None:
    form = HeadForm(width=7, bias=True, storage="hot")
    codec = form.ready({"weight": np.zeros((20, 7), np.float32), "bias": np.zeros(20, np.float32)})
    decoded = log_probs(codec.decode({"penultimate": torch.empty(4, 7, dtype=torch.float16, device=META)}, 20))
    assert (decoded.device, decoded.shape) == (META, (4, 20))


def test_a_transform_reads_twice_a_batch_on_the_host_whether_its_rows_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, read = Transform(step=0.5, corrections=9).fit(teacher_logits()), list[Tensor]()
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: read.append(tensor) is not None)
    rows = codec.encode(torch.empty(4, NUM_CLASSES, device=META))
    assert len(read) == 2
    assert {values.device for values in rows.values()} == {META}
    decoded = log_probs(codec.decode(rows, NUM_CLASSES), 2.0)
    assert (decoded.device, decoded.shape) == (META, (4, NUM_CLASSES))
    assert len(read) == 2


@pytest.mark.parametrize("form", [Dense(), TopK(k=3)], ids=lambda form: form.kind)
def test_errors_of_rows_are_computed_on_the_device(form: Any) -> None:
    logits, codec = torch.empty(4, 20, device=META), form.fitted(None)
    assert divergences(logits, codec.decode(codec.encode(logits), 20), 2.0).device == META


@pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 7), reason="fake tensors of PyTorch 2.6 ask for a driver")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_forward_pass_on_fake_cuda_tensors_mixes_no_devices(
    tmp_path: Path, cache: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batches = begin(student(tmp_path / "run", cache, losses=LOSSES, precision=precision), torch.device("cpu"))
    batch = next(batches)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = mapped(batch, lambda tensor: mode.from_tensor(tensor).to("cuda"))
        terms: Any = run.learner.terms
        for module in terms.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    table[name] = None if value is None else mode.from_tensor(value).to("cuda")
        terms._device = torch.device("cuda")
        logits = terms.model(fake.images)
    found = logits[0] if isinstance(logits, tuple) else logits
    assert found.device.type == "cuda"


def test_teachers_answer_on_the_device_alone() -> None:
    source = load_recipe(keeping(features=FEATURES), TeacherSource)
    built = build_teacher("t", source, Net(), None, 3, META)
    built.decide_layouts(torch.empty(2, 3, SIDE, SIDE, dtype=torch.uint8, device=META))
    labels = torch.zeros(4, dtype=torch.int64, device=META)
    answers = built(torch.empty(4, 3, SIDE, SIDE, dtype=torch.uint8, device=META), labels)
    found = {"logits": answers.logits, **dict(answers.features)}
    assert set(found) == {"logits", *FEATURES}
    assert {values.device for values in found.values()} == {META}
