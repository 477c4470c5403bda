"""Images from a teacher alone: keyed batches, provenance, growth, an adaptive round, refusals, and what reads them."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from logitcache.classifier import Classifier, Preprocessing
from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import CacheError, DivergenceError, MismatchError, RecipeError, Stopped
from logitcache.models import Architecture, StoredModel, save_model, weights_digest
from logitcache.models.small_cnn import SmallCNN
from logitcache.runtime.versions import versions
from logitcache.stage_one.output_folder import OutputFolder
from logitcache.stage_one.synthesize.networks import open_networks
from logitcache.stage_one.synthesize.records import Round, read_rounds
from logitcache.stage_one.synthesize.synthesize import DESCRIPTION, synthesize
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.webdataset import WebDataset
from tests.cache.made import Linear, contents, flip
from tests.stage_one.synthesized import NUM_CLASSES, PREPROCESSING, SIDE, TEACHER, learner, network, synthesis

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four batches."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = synthesize(synthesis(), folder)
    assert (result.batches, result.batches_written, result.batches_left, result.num_images) == (4, 4, 0, NUM_IMAGES)
    return folder


def student() -> Classifier:
    return Classifier(learner(), PREPROCESSING)


def read(folder: Path) -> tuple[np.ndarray, list[int], list[str]]:
    """Return pixels, labels and ids of an image folder as a data set reads them."""
    found = ImageFolder(root=str(folder / "images"), mode="L").open()
    pixels = np.stack([found.read(index).numpy() for index in range(len(found.ids))])
    return pixels, found.labels.tolist(), list(found.ids)


def test_the_folder_is_a_data_set_whose_labels_are_those_that_the_images_were_made_for(whole: Path) -> None:
    pixels, labels, ids = read(whole)
    assert pixels.shape == (NUM_IMAGES, 1, SIDE, SIDE)
    assert np.bincount(labels).tolist() == [NUM_IMAGES // NUM_CLASSES] * NUM_CLASSES
    assert all(int(name.split("/")[0]) == label for name, label in zip(ids, labels, strict=True))
    assert len({one.tobytes() for one in pixels}) == NUM_IMAGES
    made = open_networks(synthesis(), None, None)
    for number in range(4):
        batch = made.batch(0, number)
        for row, (one, label) in enumerate(zip(batch.pixels, batch.labels, strict=True)):
            place = ids.index(f"{label:06}/00-{number:05}-{row:05}.png")
            assert np.array_equal(pixels[place], one)


def test_the_record_of_a_batch_is_what_its_files_show(whole: Path) -> None:
    description = json.loads((whole / DESCRIPTION).read_text())
    assert description["teacher"] == weights_digest(network())
    assert (description["num_classes"], description["image_shape"]) == (NUM_CLASSES, [1, SIDE, SIDE])
    assert description["settings"]["steps"] == 8
    teacher = network()
    for number in range(4):
        record = json.loads((whole / f"batches/00-{number:05}.json").read_text())
        files = {name: (whole / name).read_bytes() for name in record["sha256"]}
        assert len(files) == 6
        assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == record["sha256"]
        pixels = np.stack([np.asarray(Image.open(whole / name)) for name in files])[:, None]
        labels = torch.tensor([int(name.split("/")[1]) for name in files])
        logits = teacher((torch.from_numpy(pixels).float() / 255 - 0.4) / 0.25)
        assert record["teacher_accuracy"] == float((logits.argmax(1) == labels).double().mean())
        assert record["losses"]["label"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)
        assert record["versions"] == versions()


def test_a_batch_is_a_function_of_seed_teacher_settings_round_and_number(whole: Path) -> None:
    made = open_networks(synthesis(), None, None)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone = made.batch(0, 2).pixels
    assert torch.equal(state, torch.get_rng_state())
    stored = sorted(whole.glob("images/*/00-00002-*.png"), key=lambda path: path.name)
    assert np.array_equal(alone[:, 0], np.stack([np.asarray(Image.open(path)) for path in stored]))
    assert np.array_equal(alone, made.batch(0, 2).pixels)
    others = [
        made.batch(0, 1),
        made.batch(1, 2),
        open_networks(synthesis(seed=1), None, None).batch(0, 2),
        open_networks(synthesis(jitter=2), None, None).batch(0, 2),
        open_networks(synthesis(flip=False), None, None).batch(0, 2),
        open_networks(synthesis(teacher=None), Classifier(network(seed=2), student().preprocessing), None).batch(0, 2),
    ]
    assert not any(np.array_equal(alone, other.pixels) for other in others)


def test_more_steps_make_images_that_are_nearer_to_what_the_teacher_saw() -> None:
    short, long = (open_networks(synthesis(steps=steps, batch_size=30), None, None).batch(0, 0) for steps in (1, 80))
    assert long.losses["label"] < short.losses["label"] / 2
    assert long.losses["batch_norm"] < short.losses["batch_norm"] / 2
    assert long.teacher_accuracy > max(0.8, short.teacher_accuracy)


@pytest.mark.parametrize("term", ["total_variation_l1", "total_variation_l2", "l2", "diversity"])
def test_a_loss_that_counts_is_lower_than_without_it(term: str) -> None:
    without, counted = (
        open_networks(synthesis(steps=30, batch_size=12, losses={term: weight}), None, None).batch(0, 0)
        for weight in (0.0, 3.0)
    )
    assert counted.losses[term] < without.losses[term]


def test_parts_and_a_continued_run_write_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    for number, left in ((2, 2), (1, 0)):
        result = synthesize(synthesis(), tmp_path / "parts", part=f"{number}/2")
        assert (result.batches_written, result.batches_left) == (2, left)
    assert contents(tmp_path / "parts") == contents(whole)
    (tmp_path / "parts/batches/00-00001.json").unlink()
    (tmp_path / "parts/images/000000/00-00001-00000.png").unlink()
    (tmp_path / "parts/images/000000/00-00001-00000.png.7-ab.logitcache-tmp").write_bytes(b"of a killed writer")
    assert synthesize(synthesis(), tmp_path / "parts").batches_written == 1
    assert contents(tmp_path / "parts") == contents(whole)


def test_a_batch_whose_files_are_missing_or_damaged_is_made_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    flip(tmp_path / "out/images/000001/00-00000-00002.png", 20)
    (tmp_path / "out/images/000000/00-00003-00000.png").unlink()
    assert synthesize(synthesis(), tmp_path / "out").batches_written == 2
    assert contents(tmp_path / "out") == contents(whole)


def test_batches_are_added_to_those_that_are_there(whole: Path, tmp_path: Path) -> None:
    synthesize(synthesis(num_batches=2), tmp_path / "out")
    before = contents(tmp_path / "out")
    assert synthesize(synthesis(), tmp_path / "out").batches_written == 2
    after = contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {DESCRIPTION}
    assert after == contents(whole)


def test_a_folder_of_other_images_is_refused(whole: Path) -> None:
    before = contents(whole)
    for changes, named in (
        ({"lr": 0.3}, "settings"),
        ({"seed": 1}, "settings"),
        ({"num_batches": 3}, "rounds"),
        ({"format": "webdataset"}, "settings"),
    ):
        with pytest.raises(MismatchError, match=rf"holds other images:\n  {named}(.|\n)*Fix: another folder"):
            synthesize(synthesis(**changes), whole)
    other = Classifier(network(seed=2), PREPROCESSING)
    with pytest.raises(MismatchError, match=r"holds other images:\n  teacher: "):
        synthesize(synthesis(), whole, teacher=other)
    assert contents(whole) == before


def test_an_adaptive_round_adds_images_on_which_the_student_disagrees(whole: Path, tmp_path: Path) -> None:
    losses = {"competition": 10.0}
    first = synthesize(synthesis(losses=losses), tmp_path / "out")
    assert (first.round, first.student_agreement) == (0, None)
    before = contents(tmp_path / "out")
    second = synthesize(synthesis(losses=losses, num_batches=2), tmp_path / "out", student=student())
    assert (second.round, second.batches_written, second.num_images) == (1, 2, 12)
    after = contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {DESCRIPTION}
    added = {name for name in after if name not in before}
    assert all(name.rpartition("/")[2].startswith("01-") for name in added)
    assert len([name for name in added if name.endswith(".png")]) == 12
    again = synthesize(synthesis(losses=losses, num_batches=2), tmp_path / "out", student=student())
    assert asdict(again) == asdict(second) | {"batches_written": 0}
    description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert [one["student"] for one in description["rounds"]] == [None, weights_digest(learner())]
    # The first round goes on as if there were no other.
    assert synthesize(synthesis(losses=losses, num_batches=5), tmp_path / "out").batches_written == 1
    assert synthesize(synthesis(losses=losses), tmp_path / "url").batches_written == 4
    one, other = contents(tmp_path / "out"), contents(tmp_path / "url")
    assert all(one[name] == other[name] for name in other if name != DESCRIPTION)


def test_rounds_that_begin_at_once_get_numbers_of_their_own(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = synthesis(losses={"competition": 10.0}, num_batches=1)
    shutil.copytree(whole, tmp_path / "out")
    description = json.loads((whole / DESCRIPTION).read_text())
    description["settings"]["losses"]["competition"] = 10.0
    (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(description))
    both = threading.Barrier(2)

    def slowly(folder: OutputFolder) -> list[Round]:
        rounds = read_rounds(folder)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # without a lock both have read, and none has written
        return rounds

    monkeypatch.setattr(sys.modules[synthesize.__module__], "read_rounds", slowly)
    students = [Classifier(network(2, steps, 1), PREPROCESSING) for steps in (3, 4)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda one: synthesize(recipe, tmp_path / "out", student=one), students))
    assert sorted(one.round for one in found) == [1, 2]
    rounds = json.loads((tmp_path / "out" / DESCRIPTION).read_text())["rounds"]
    digests = [weights_digest(one.module) for one in students]
    assert [rounds[result.round]["student"] for result in found] == digests


def test_competition_makes_images_on_which_the_answers_of_teacher_and_student_are_further_apart() -> None:
    apart = []
    for weight in (0.0, 10.0):
        made = open_networks(synthesis(steps=60, batch_size=30, losses={"competition": weight}), None, student())
        batch = made.batch(1, 0)
        inputs = (torch.from_numpy(batch.pixels).float() / 255 - 0.4) / 0.25
        answers = [module(inputs).softmax(1).numpy() for module in (network(), learner())]
        divergences = [jensenshannon(*pair) ** 2 for pair in zip(*answers, strict=True)]
        assert batch.losses["competition"] == pytest.approx(1 - np.mean(divergences), abs=1e-4)
        assert batch.student_agreement == np.mean(answers[0].argmax(1) == answers[1].argmax(1))
        apart.append(np.mean(divergences))
    assert apart[1] > apart[0] + 0.02


def test_archives_hold_the_images_and_labels_of_the_folder(whole: Path, tmp_path: Path) -> None:
    result = synthesize(synthesis(format="webdataset"), tmp_path / "out")
    assert result.images == f"{tmp_path}/out/shards"
    shards = sorted(map(str, (tmp_path / "out/shards").glob("*.tar")))
    assert len(shards) == 4
    found = WebDataset(shards=f"{result.images}/00-{{00000..00003}}.tar", mode="L").open()
    pixels, labels, ids = read(whole)
    place = {name.rpartition("/")[2].removesuffix(".png"): index for index, name in enumerate(ids)}
    assert set(found.ids) == set(place)
    for index, name in enumerate(found.ids):
        assert np.array_equal(found.read(index).numpy(), pixels[place[name]])
        assert found.labels[index] == labels[place[name]]


class Stopping(nn.Module):
    """The teacher, which is sent SIGTERM in its third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.passes = network(), 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 1 + 2 * 9 + 4:  # of a batch eight steps, and one of the images as they are written
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.as_tensor(self.network(pixels))


def test_a_signal_ends_it_at_once_and_the_same_call_continues(tmp_path: Path) -> None:
    module = Stopping()
    stopping = Classifier(module, PREPROCESSING)
    with pytest.raises(Stopped, match=r"batch 2 and later ones of .* are not written; run it again") as raised:
        synthesize(synthesis(), tmp_path / "out", teacher=stopping)
    assert raised.value.exit_code == 75
    assert len(list((tmp_path / "out/batches").iterdir())) == 2
    assert module.passes == 1 + 2 * 9 + 4
    assert synthesize(synthesis(), tmp_path / "out", teacher=stopping).batches_written == 2
    module.passes = 1000
    synthesize(synthesis(), tmp_path / "other", teacher=stopping)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


FIVE = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 5)), PREPROCESSING)
COLOURED = {"channels": 3, "size": 4}
REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (COLOURED, {"teacher": Classifier(Linear(), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))}, "has no BatchNorm"),
    ({"teacher": None}, {}, "names no teacher"),
    ({"teacher": None}, {"teacher": network()}, "does not know how its pixels were normalised"),
    ({"size": None}, {}, "takes images of any size, and the recipe gives none"),
    ({"channels": 3}, {}, "3 channels"),
    ({"num_batches": 1, "batch_size": 4}, {}, r"leave some of 3 classes without any(.|\n)*Fix: num_batches: 2"),
    ({}, {"part": "3/2"}, "Fix: --part"),
    ({}, {"student": FIVE}, "the student has 5 classes, the teacher 3"),
    ({"losses": {"competition": 0}}, {"student": FIVE}, "losses.competition is 0"),
    ({}, {"student": learner()}, "student does not know"),
    ({}, {"student": "no/such/run"}, "no/such/run is not a run"),
    ({"teacher": TEACHER | {"classes": [0, 7]}}, {}, "name output 7"),
]


@pytest.mark.parametrize(("changes", "options", "text"), REFUSALS, ids=[text[:20] for *_, text in REFUSALS])
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    changes: dict[str, Any], options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=text) as raised:
        synthesize(synthesis(**changes), tmp_path / "out", **options)
    assert "Fix:" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_recipes_that_contradict_themselves_are_refused() -> None:
    nothing = {"label": 0, "batch_norm": 0}
    wrong: list[dict[str, Any]] = [{"jitter": SIDE}, {"batch_size": 1}, {"channels": 2}, {"losses": nothing}]
    for changes in (*wrong, {"losses": {"l2": -1}}, {"format": "jpeg"}):
        with pytest.raises(RecipeError):
            synthesis(**changes)


def test_images_that_diverge_and_a_damaged_description_are_reported(tmp_path: Path) -> None:
    broken = network()
    next(broken[7].parameters())[0, 0] = float("inf")
    with pytest.raises(DivergenceError, match=r"batch 0 of round 0 diverges.*Fix: a lower lr"):
        synthesize(synthesis(), tmp_path / "out", teacher=Classifier(broken, PREPROCESSING))
    assert not (tmp_path / "out/batches").exists()
    (tmp_path / "out" / DESCRIPTION).write_text("[")
    with pytest.raises(CacheError, match=r"synthesis.json' is damaged(.|\n)*Fix: remove it"):
        synthesize(synthesis(), tmp_path / "out")
    for wrong in ('{"rounds": 3}', '{"rounds": [{"student": 5}]}'):
        (tmp_path / "out" / DESCRIPTION).write_text(wrong)
        with pytest.raises(CacheError, match=r"the rounds of .*out is damaged"):
            synthesize(synthesis(), tmp_path / "out")
    (tmp_path / "out" / DESCRIPTION).unlink()
    record = tmp_path / "out/batches/00-00000.json"
    record.parent.mkdir()
    record.write_text('{"losses": {}}')
    with pytest.raises(CacheError, match=r"batches/00-00000.json' is damaged: teacher_accuracy(.|\n)*Fix: remove"):
        synthesize(synthesis(), tmp_path / "out")


def test_a_dry_run_predicts_the_time_of_what_is_left_and_writes_nothing(whole: Path, tmp_path: Path) -> None:
    planned = synthesize(synthesis(), tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert (planned.batches, planned.batches_left, planned.teacher_accuracy) == (4, 4, None)
    assert planned.predicted_seconds is not None
    assert 0 < planned.predicted_seconds < 60
    before = contents(whole)
    assert synthesize(synthesis(), whole, dry_run=True).predicted_seconds == 0
    assert contents(whole) == before


def test_classes_choose_outputs_of_the_network(tmp_path: Path) -> None:
    result = synthesize(synthesis(teacher=TEACHER | {"classes": [2, 0]}, steps=60), tmp_path / "out")
    pixels, labels, _ = read(tmp_path / "out")
    answers = network()((torch.from_numpy(pixels).float() / 255 - 0.4) / 0.25)[:, [2, 0]].argmax(1)
    assert float((answers == torch.tensor(labels)).double().mean()) == result.teacher_accuracy
    assert result.teacher_accuracy is not None
    assert result.teacher_accuracy > 0.9


def write_run(folder: Path, module: nn.Module, model: Architecture, preprocessing: Preprocessing) -> str:
    """Write a run's description and weights."""
    folder.mkdir()
    save_model(folder, module, StoredModel(model=model, preprocessing=preprocessing, num_classes=10, in_channels=1))
    return str(folder)


def test_the_command_takes_a_recipe_or_a_run_and_a_student_and_prints_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "synthesize.yaml", tmp_path / "out"
    file.write_text(dump_recipe(synthesis()))
    assert main(["recipe", "check", str(file)]) == 0
    assert main(["synthesize", str(file), str(out), "--set", "steps=1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert document["batches_written"] == 4
    assert document["images"] == f"{out}/images"
    (tmp_path / "precompute.yaml").touch()
    assert main(["synthesize", str(file), str(out), "--set", "steps=1"]) == 0
    assert f"Next: logitcache precompute {tmp_path}/precompute.yaml" in capsys.readouterr().err
    assert main(["synthesize", str(file), str(out)]) == 4
    assert "steps" in capsys.readouterr().err
    entry = SmallCNN(width=2)
    plain = Preprocessing(mean=(0.5,), std=(0.5,))
    runs = [write_run(tmp_path / name, entry.build(10, 1).module, entry, plain) for name in ("teacher", "student")]
    small = ["--set", "size=8", "--set", "steps=1", "--set", "num_batches=1", "--set", "batch_size=20"]
    for teacher in (runs[0], f"run:{runs[0]}"):
        assert main(["synthesize", teacher, str(tmp_path / "of_run"), *small]) == 0
        shown = capsys.readouterr().err
        assert f"Next: logitcache recipe new --images {tmp_path}/of_run/images --teacher {teacher}" in shown
    assert main(["synthesize", runs[0], str(tmp_path / "of_run"), "--student", runs[1], *small]) == 0
    assert len(list((tmp_path / "of_run/images").glob("*/01-*.png"))) == 20
    capsys.readouterr()
    for wrong in (["nothing:x"], ["timm"], [runs[0]]):
        assert main(["synthesize", *wrong, str(tmp_path / "w")]) == 2
        assert "Fix:" in capsys.readouterr().err
        assert not (tmp_path / "w").exists()
