"""Suspect labels: the ranking of confident learning, over the teachers' answers to many views."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.errors import RecipeError
from logitcache.report.suspects import find_suspects, rank
from logitcache.views.datasets import Bundled, open_dataset
from logitcache.views.keys import ViewKey
from tests.student.small import NUM_IMAGES, fill, network

SWAPPED = (3, 17, 64, 120, 199)


class Mislabelled:
    """Bundled images, of which a few have the label of the next class."""

    classes = Bundled().open().class_names

    def __init__(self) -> None:
        self._images = open_dataset(Bundled(num_images=NUM_IMAGES))

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self._images.labels[index])
        return self._images.read(index), (label + 1) % 10 if index in SWAPPED else label


class Knowing(nn.Module):
    """A teacher that knows the true classes of the bundled images by their nearest neighbour."""

    def __init__(self, certainty: float) -> None:
        super().__init__()
        images = open_dataset(Bundled(num_images=NUM_IMAGES))
        pixels = torch.stack([images.read(index) for index in range(NUM_IMAGES)]).float() / 255
        self.known = nn.Parameter(((pixels - 0.3) / 0.3).flatten(1), requires_grad=False)
        self.classes = torch.from_numpy(images.labels.copy())
        self.certainty = certainty

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.known).argmin(dim=1)
        noise = torch.sin(nearest.float()[:, None] * torch.arange(1, 11)) * 0.05
        return nn.functional.one_hot(self.classes[nearest], 10) * self.certainty + noise


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of unmixed views in which five labels are wrong."""
    teachers = {"sure": Knowing(6.0), "unsure": Knowing(2.0)}
    path = tmp_path_factory.mktemp("suspects") / "cache"
    views = {"num_views": 3, "seed": 3, "augmentations": [{"kind": "random_crop", "size": 28, "padding": 1}]}
    return fill(path, teachers, images=Mislabelled(), views=views)


def mean_probabilities(path: Path) -> NDArray[np.float64]:
    """Return the mean over teachers and views, [N, C], by another way: view by view, all rows at once."""
    cache = open_cache(path)
    found = [
        targets.log_probs().double().exp().numpy()
        for view in range(cache.num_views)
        for targets in cache.answers([ViewKey(view, index) for index in range(len(cache))]).values()
    ]
    return np.mean(found, axis=0)


def confident_learning(labels: NDArray[np.int64], p: NDArray[np.float64]) -> tuple[list[float], list[int]]:
    """Normalised margins and off-diagonal members, written from the paper, row by row."""
    thresholds = {c: np.mean([p[i][c] for i in range(len(p)) if labels[i] == c]) for c in set(labels.tolist())}
    margins, members = [], []
    for i, row in enumerate(p):
        rest = [value for c, value in enumerate(row) if c != labels[i]]
        margins.append((row[labels[i]] - max(rest) + 1) / 2)
        best = int(np.argmax(row))
        if best != labels[i] and best in thresholds and row[best] >= thresholds[best]:
            members.append(i)
    return margins, members


def test_wrong_labels_are_found_and_ranked_as_confident_learning_does(doubtful: Path) -> None:
    found = find_suspects(doubtful, ["dataset={kind: custom, factory: 'tests.report.test_suspects:Mislabelled'}"])
    p, labels = mean_probabilities(doubtful), open_cache(doubtful).labels
    margins, members = confident_learning(labels, p)
    assert [row["index"] for row in found.rows] == sorted(members, key=lambda i: margins[i])
    np.testing.assert_allclose([row["score"] for row in found.rows], [margins[row["index"]] for row in found.rows])
    assert set(SWAPPED) == {row["index"] for row in found.rows[: len(SWAPPED)]}
    names = Mislabelled.classes
    true = open_dataset(Bundled(num_images=NUM_IMAGES)).labels
    for row in found.rows:
        if row["index"] in SWAPPED:
            assert (row["label"], row["suggested"]) == (names[labels[row["index"]]], names[true[row["index"]]])
            assert row["contradicted"] == 1.0
    assert (found.labelled, found.views, found.teachers) == (NUM_IMAGES, 3, ("sure", "unsure"))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_cleanlab(seed: int) -> None:
    ranking = pytest.importorskip("cleanlab.rank", reason="cleanlab (AGPL) is no dependency, not even of tests")
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 7, 300)
    p = generator.dirichlet(np.full(7, 0.3), 300)
    other = p.copy()
    other[np.arange(300), labels] = -1
    score, suspect = rank(labels, p[np.arange(300), labels], other.max(axis=1), other.argmax(axis=1))
    theirs = ranking.get_label_quality_scores(labels, p, method="normalized_margin")
    np.testing.assert_allclose(score, theirs)
    filters = pytest.importorskip("cleanlab.filter")
    issues = filters.find_label_issues(labels, p, filter_by="confident_learning", n_jobs=1)
    assert set(np.flatnonzero(suspect)) <= set(np.flatnonzero(issues | (p.argmax(axis=1) != labels)))


def test_a_class_without_images_is_never_suggested() -> None:
    labels = np.array([0, 0, 1, 1])
    _, suspect = rank(labels, np.full(4, 0.1), np.full(4, 0.8), np.array([2, 1, 2, 0]))
    assert suspect.tolist() == [False, True, False, True]


def test_the_command_writes_csv_and_contact_sheet(
    doubtful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = "dataset={kind: custom, factory: 'tests.report.test_suspects:Mislabelled'}"
    words = ["--csv", str(tmp_path / "s.csv"), "--sheet", str(tmp_path / "s.html"), "--top", "2", "--json"]
    assert main(["suspects", str(doubtful), "--set", factory, *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 2
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert len(rows) == document["suspects"] >= len(SWAPPED)
    assert [int(row["index"]) for row in rows[:2]] == [row["index"] for row in document["rows"]]
    page = (tmp_path / "s.html").read_text()
    assert page.count("data:image/png;base64,") == len(rows)
    assert all(f"image {row['index']}<" in page for row in rows)


def test_without_images_rows_are_named_by_index(doubtful: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suspects", str(doubtful), "--teacher", "sure", "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["teachers"] == ["sure"]
    assert {row["id"] for row in document["rows"]} == {None}
    assert "images are named by their index alone" in shown.err
    assert main(["suspects", str(doubtful), "--sheet", "s.html"]) == 2
    assert "Fix: give the data set" in capsys.readouterr().err


def test_labels_that_nobody_can_contradict_are_refused(tmp_path: Path) -> None:
    mixed = fill(
        tmp_path / "mixed",
        {"net": network()},
        views={"num_views": 1, "mixing": [{"kind": "mixup"}]},
    )
    with pytest.raises(RecipeError, match=r"mixed images(.|\n)*Fix"):
        find_suspects(mixed)
    unlabelled = fill(tmp_path / "none", images={"kind": "custom", "factory": "tests.student.small:Unlabelled"})
    with pytest.raises(RecipeError, match=r"labels are compared(.|\n)*Fix"):
        find_suspects(unlabelled)
    with pytest.raises(RecipeError, match="no"):
        find_suspects(unlabelled, teachers=["other"])
