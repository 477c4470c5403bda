"""Pairings: the join by ids, its record, what is compared, and what a record from elsewhere may not do."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import logitcache as lc
from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.pairs.join import join_ids, join_pairs, read_pairs
from logitcache.cache.pairs.record import NOTE, PairingRecord
from logitcache.cli.app import main
from logitcache.config import trust
from logitcache.errors import CacheError, DataError, MismatchError, RecipeError, RefusedError, ReplayMismatchError
from logitcache.views.canaries import array_digest as canary_digest
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.keys import ViewKey
from tests.cache.made import Linear, run
from tests.views.images import textured

COUNT, SIDE = 12, 24
SPEC = {
    "num_views": 2,
    "seed": 3,
    "augmentations": [{"kind": "random_resized_crop", "size": 16}, {"kind": "horizontal_flip"}],
}
MIXED = SPEC | {"mixing": [{"kind": "cutmix"}]}


class Things:
    """Images of numbered things, in an order and at a size; `lost` are not there."""

    classes = ("a", "b")

    def __init__(
        self, side: int = SIDE, ending: str = "", order: range = range(COUNT), lost: tuple[int, ...] = ()
    ) -> None:
        kept = [number for number in order if number not in lost]
        every = textured(COUNT, side, side)
        self.ids = [f"folder/thing{number:02}{ending}" for number in kept]
        self.pixels = [every[number] for number in kept]
        self.labels = [number % 2 for number in kept]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], self.labels[index]


def filled(path: Path, images: Things, views: Any, **changes: Any) -> None:
    side = 16 if views["augmentations"][0]["kind"] == "random_resized_crop" else SIDE
    run(path, images=images, module=Linear(2, side), views=views, **changes)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paired") / "c.zarr"
    filled(path, Things(), SPEC)
    return path


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)


def paired(cache: Path, out: Path, student: Things | None = None, **options: Any) -> Path:
    images = Things(SIDE // 2, order=range(COUNT - 1, -1, -1)) if student is None else student
    lc.pair(cache, out, images, teacher_dataset=Things(), **options)
    return out


def views(cache: Cache, out: Path, student: Things, **options: Any) -> Any:
    return cache.views(student, pairing=cache.pairing(out), **options)


def forged(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and sign it again, as an attacker would."""
    file = out / "pairing.json"
    stored = json.loads(file.read_bytes())
    change(stored["pairing"])
    stored["sha256"] = PairingRecord.model_validate_json(json.dumps(stored["pairing"])).digest()
    file.write_text(json.dumps(stored))


IDS = ["a/0.png", "a/1.png", "b/0.png"]


@pytest.mark.parametrize(
    ("student", "by", "rows", "unmatched", "unused", "doubled"),
    [
        (["b/0.png", "a/1.png", "a/0.png"], "id", [2, 1, 0], [], [], []),
        (["a/0.png", "c/0.png"], "id", [0, -1, -1], ["a/1.png", "b/0.png"], ["c/0.png"], []),
        (["b/0.jpg", "a/1.tif", "a/0"], "stem", [2, 1, 0], [], [], []),
        (["a/0.jpg", "a/0.tif", "a/1.jpg", "b/0.jpg"], "stem", [0, 2, 3], [], [], ["a/0"]),
        (["a/0.jpg"], "id", [-1, -1, -1], IDS, ["a/0.jpg"], []),
    ],
)
def test_images_are_joined_by_their_ids(
    student: list[str], by: Any, rows: list[int], unmatched: list[str], unused: list[str], doubled: list[str]
) -> None:
    found = join_ids(IDS, student, by)
    assert (found.rows.tolist(), found.unmatched, found.unused, found.doubled) == (rows, unmatched, unused, doubled)


def test_a_list_of_pairs_joins_ids_that_differ() -> None:
    student = ["x", "y", "z"]
    found = join_pairs(IDS, student, [("b/0.png", "x"), ("a/0.png", "z"), ("a/1.png", "y")])
    assert (found.rows.tolist(), found.unmatched, found.unused, found.doubled) == ([2, 1, 0], [], [], [])
    # One image for two, two for one, an id of neither side, and one that is not listed.
    found = join_pairs(IDS, student, [("a/0.png", "x"), ("a/1.png", "x"), ("a/1.png", "y"), ("gone", "y")])
    assert found.rows.tolist() == [0, 0, -1]
    assert (found.unmatched, found.unused, found.doubled) == (["b/0.png", "gone"], ["z"], ["a/1.png", "x", "y"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n", "has no column"),
        ("teacher,student\n", "lists no pair"),
        ("teacher,student\na/0.png,\n", "csv:2 lacks an id"),
        ("teacher,student\na/0.png\n", "csv:2 lacks an id"),
        ("", "has no column"),
    ],
)
def test_a_list_that_is_none_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(text)
    with pytest.raises(RecipeError, match=rf"{says}.*Fix: "):
        read_pairs(file)
    with pytest.raises(RecipeError, match=r"cannot be read.*Fix: "):
        read_pairs(tmp_path / "none.csv")


def test_a_list_may_have_more_columns_and_a_mark_of_byte_order(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes('\ufeffstudent,note,teacher\r\nx,"a, b",é\r\n'.encode())
    assert read_pairs(tmp_path / "p.csv") == [("é", "x")]


def test_a_pairing_is_what_both_sides_are(sound: Path, tmp_path: Path) -> None:
    out, student = paired(sound, tmp_path / "p"), Things(SIDE // 2, order=range(COUNT - 1, -1, -1))
    record = json.loads((out / "pairing.json").read_bytes())
    assert sorted(file.name for file in out.iterdir()) == ["canaries", "pairing.json", "rows", "sizes"]
    assert record["note"] == NOTE
    assert np.fromfile(out / "rows", "<i8").tolist() == list(range(COUNT - 1, -1, -1))
    assert np.fromfile(out / "sizes", "<i8").tolist() == [SIDE] * 2 * COUNT
    kept = record["pairing"]
    assert [kept[key] for key in ("unmatched", "unused", "doubled", "other_labels")] == [0, 0, 0, 0]
    assert kept["image_shape"] == [3, 8, 8]  # half of 16, as the images are half as large
    pixels = np.fromfile(out / "canaries", np.uint8).reshape(-1, 3, 8, 8)
    found = views(open_cache(sound), out, student)
    for canary, image in zip(kept["canaries"], pixels, strict=True):
        assert torch.equal(found[canary["view"], canary["index"]], torch.from_numpy(image))
        own = student.pixels[COUNT - 1 - canary["index"]]
        assert (canary["raw"], canary["augmented"]) == (canary_digest(own.numpy()), canary_digest(image))


def test_the_same_pairing_is_written_again_and_no_other_over_it(sound: Path, tmp_path: Path) -> None:
    out = paired(sound, tmp_path / "p")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "pairing.json").unlink()  # as of a run that was killed
    (out / "rows").write_bytes(b"half")
    paired(sound, out)
    paired(sound, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with pytest.raises(RecipeError, match=r"holds another pairing\. Fix: another OUT"):
        paired(sound, out, size=16)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_ids_that_are_left_or_doubled_are_refused_unless_allowed(sound: Path, tmp_path: Path) -> None:
    fewer = Things(SIDE, lost=(3, 5))
    with pytest.raises(DataError, match=r"2 ids of the teacher's have no pair: 'folder/thing03', .*--allow-unmatched"):
        paired(sound, tmp_path / "p", fewer)
    out = paired(sound, tmp_path / "p", fewer, allow_unmatched=True)
    cache = open_cache(sound)
    pairing = cache.pairing(out)
    assert pairing.record.unmatched == 2
    assert pairing.matched is not None
    assert pairing.matched.tolist() == [index for index in range(COUNT) if index not in (3, 5)]
    found = [batch.keys for batch in cache.loader(5, dataset=fewer, pairing=pairing).epoch(0)]
    assert sorted(torch.cat(found)[:, 1].tolist()) == pairing.matched.tolist()
    twice = [(f"folder/thing{n:02}", f"folder/thing{n - n % 4 + n % 2:02}") for n in range(COUNT)]
    with pytest.raises(DataError, match=r"6 ids of the student's have none"):
        paired(sound, tmp_path / "q", pairs=twice)
    with pytest.raises(DataError, match=r"6 ids stand for several images: 'folder/thing00', .*--allow-doubled"):
        paired(sound, tmp_path / "q", pairs=twice, allow_unmatched=True)
    paired(sound, tmp_path / "q", Things(), pairs=twice, allow_unmatched=True, allow_doubled=True)
    assert cache.pairing(tmp_path / "q").rows.tolist() == [n - n % 4 + n % 2 for n in range(COUNT)]
    with pytest.raises(DataError, match=r"no id is on both sides.*Fix: --by stem"):
        paired(sound, tmp_path / "r", Things(ending=".png"))
    paired(sound, tmp_path / "r", Things(ending=".png"), by="stem")


def test_mixed_views_need_a_pair_for_each_image(tmp_path: Path) -> None:
    filled(tmp_path / "m.zarr", Things(), MIXED)
    with pytest.raises(DataError, match=r"mixes each image with another, and 1 have no pair\. Fix: "):
        paired(tmp_path / "m.zarr", tmp_path / "p", Things(lost=(3,)), allow_unmatched=True)


def test_pairs_of_two_labels_are_counted_with_a_warning(sound: Path, tmp_path: Path) -> None:
    other = Things()
    other.labels[4] = 1
    with pytest.warns(
        UserWarning, match=r"1 of 12 pairs have two labels, such as 'folder/thing04' and 'folder/thing04'"
    ):
        paired(sound, tmp_path / "p", other)
    assert open_cache(sound).pairing(tmp_path / "p").record.other_labels == 1
    other.classes = ("x", "y")
    paired(sound, tmp_path / "q", other)
    assert open_cache(sound).pairing(tmp_path / "q").record.other_labels is None


class Sized(Things):
    """Images of sizes of their own."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.pixels = [torch.zeros((3, *size), dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "size", "shown"),
    [
        ([(SIDE // 2, SIDE // 2)] * COUNT, None, [8, 8]),
        ([(SIDE, SIDE * 2)] * COUNT, None, [16, 32]),
        ([(SIDE, SIDE)] * COUNT, None, [16, 16]),
        ([(9 + n, 30) for n in range(COUNT)], None, [16, 16]),
        ([(9 + n, 30) for n in range(COUNT)], 20, [20, 20]),
        ([(SIDE // 2, SIDE // 2)] * COUNT, (16, 12), [16, 12]),
    ],
    ids=["half", "wide", "same", "any", "any_20", "given"],
)
def test_views_are_scaled_as_the_images_are_or_as_is_asked(
    sizes: Any, size: Any, shown: Any, sound: Path, tmp_path: Path
) -> None:
    lc.pair(sound, tmp_path / "p", Sized(sizes), teacher_dataset=Things(), size=size)
    assert open_cache(sound).pairing(tmp_path / "p").record.image_shape == (3, *shown)


def test_odd_sides_are_half_of_even_and_odd_ones(tmp_path: Path) -> None:
    """Halves are rounded down, and the factor is a half all the same."""
    seen = [(40 + n, 61 - n) for n in range(COUNT)]
    filled(tmp_path / "c.zarr", Sized(seen), SPEC)
    halves = Sized([(height // 2, width // 2) for height, width in seen])
    found = lc.pair(tmp_path / "c.zarr", tmp_path / "p", halves, teacher_dataset=Sized(seen))
    assert found.image_shape == (3, 8, 8)


def write_photographs(root: Path, side: int) -> dict[str, Any]:
    for number, pixels in enumerate(textured(COUNT, side, side)):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / "ab"[number % 2] / f"{number}.jpg", quality=95)
    return {"kind": "image_folder", "root": str(root)}


def test_photographs_that_the_teacher_saw_reduced_are_paired_in_full(tmp_path: Path) -> None:
    """The teacher's views are drawn for the sizes that it decodes."""
    spec = SPEC | {"decode": "scaled", "augmentations": [{"kind": "resize", "size": 16}]}
    run(tmp_path / "c.zarr", dataset=write_photographs(tmp_path / "photos", 64), module=Linear(2, 16), views=spec)
    entry = ImageFolder(root=str(tmp_path / "photos"))
    lc.pair(tmp_path / "c.zarr", tmp_path / "p", entry)
    cache = open_cache(tmp_path / "c.zarr")
    pairing = cache.pairing(tmp_path / "p")
    assert pairing.sizes.tolist() == [[16, 16]] * COUNT  # a quarter
    assert pairing.record.image_shape == (3, 16, 16)
    seen, shown = cache.views(), cache.views(pairing=pairing)
    for key in (ViewKey(0, 0), ViewKey(1, 7)):
        assert (seen[key].float() - shown[key].float()).abs().mean() < 16
        assert not torch.equal(seen[key], shown[key])


def test_a_size_that_nothing_gives_is_refused(tmp_path: Path) -> None:
    plain = {"augmentations": [{"kind": "horizontal_flip"}]}
    filled(tmp_path / "c.zarr", Things(), plain)
    with pytest.raises(RecipeError, match=r"no augmentation of .* gives views a size.*Fix: leave out --size"):
        paired(tmp_path / "c.zarr", tmp_path / "p", size=16)
    with pytest.raises(DataError, match="views must have one size"):
        lc.pair(
            tmp_path / "c.zarr", tmp_path / "p", Sized([(9 + n, 30) for n in range(COUNT)]), teacher_dataset=Things()
        )
    assert not (tmp_path / "p").exists()


def test_other_images_are_refused_with_and_without_a_pairing(sound: Path, tmp_path: Path) -> None:
    out, cache, student = paired(sound, tmp_path / "p"), open_cache(sound), Things(SIDE // 2, order=range(11, -1, -1))
    with pytest.raises(MismatchError, match="was made from other images"):
        cache.views(student)
    with pytest.raises(MismatchError, match="was made from other images"):
        views(cache, out, Things())
    student.pixels[7] = student.pixels[7] + 1
    with pytest.raises(MismatchError, match=r"content of the images: recorded .*"):
        views(cache, out, student)


def test_other_pixels_of_the_same_images_are_refused(sound: Path, tmp_path: Path) -> None:
    out, cache = paired(sound, tmp_path / "p"), open_cache(sound)
    student = Things(SIDE // 2, order=range(COUNT - 1, -1, -1))

    def other_plan(record: dict[str, Any]) -> None:
        record["canaries"][0]["plan"] = "0" * 64

    forged(out, other_plan)
    with pytest.raises(ReplayMismatchError, match=r"(?s)those that `logitcache pair` recorded .*plans 23/24 equal"):
        views(cache, out, student)
    views(cache, out, student, verify="off")
    paired(sound, tmp_path / "q")
    drifted = np.fromfile(tmp_path / "q/canaries", np.uint8)
    drifted[0] ^= 1
    (tmp_path / "q/canaries").write_bytes(drifted.tobytes())
    cache.pairing(tmp_path / "q")

    def as_drifted(record: dict[str, Any]) -> None:
        record["canaries"][0]["augmented"] = canary_digest(drifted.reshape(-1, 3, 8, 8)[0])

    forged(tmp_path / "q", as_drifted)
    with pytest.raises(ReplayMismatchError, match="numeric drift"):
        views(cache, tmp_path / "q", student)
    with pytest.warns(UserWarning, match="Accepted, as verify is numeric"):
        views(cache, tmp_path / "q", student, verify="numeric")


def test_a_pairing_is_of_the_images_and_views_not_of_the_answers(sound: Path, tmp_path: Path) -> None:
    out, student = paired(sound, tmp_path / "p"), Things(SIDE // 2, order=range(COUNT - 1, -1, -1))
    filled(tmp_path / "grown.zarr", Things(), SPEC | {"num_views": 5})
    views(open_cache(tmp_path / "grown.zarr"), out, student)
    filled(tmp_path / "other.zarr", Things(), SPEC | {"seed": 4})
    with pytest.raises(MismatchError, match=r"the views differ\. Fix: logitcache pair"):
        open_cache(tmp_path / "other.zarr").pairing(out)
    filled(tmp_path / "fewer.zarr", Things(lost=(2,)), SPEC)
    with pytest.raises(MismatchError, match="the images differ"):
        open_cache(tmp_path / "fewer.zarr").pairing(out)


def truncated(out: Path, name: str) -> None:
    (out / name).write_bytes((out / name).read_bytes()[:-8])


def other_row(out: Path, place: int) -> None:
    """Let the first row name another image, and sign it."""
    rows = np.fromfile(out / "rows", "<i8")
    rows[0] = place
    (out / "rows").write_bytes(rows.tobytes())
    forged(out, lambda record: record.update(rows=hashlib.sha256(rows.tobytes()).hexdigest()))


def linked(out: Path, name: str) -> None:
    os.rename(out / name, out / "elsewhere")
    (out / name).symlink_to("elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no folder": lambda out: [file.unlink() for file in out.iterdir()],
    "no json": lambda out: (out / "pairing.json").write_text("{"),
    "other json": lambda out: (out / "pairing.json").write_text("[]"),
    "deep json": lambda out: (out / "pairing.json").write_text("[" * 100_000),
    "long json": lambda out: (out / "pairing.json").write_text(" " * (2 << 20)),
    "later format": lambda out: (out / "pairing.json").write_text('{"format_version": 2}'),
    "unsigned": lambda out: (out / "pairing.json").write_text(
        (out / "pairing.json").read_text().replace('"unused": 0', '"unused": 1')
    ),
    "short rows": lambda out: truncated(out, "rows"),
    "short sizes": lambda out: truncated(out, "sizes"),
    "no rows": lambda out: (out / "rows").unlink(),
    "a FIFO": lambda out: ((out / "rows").unlink(), os.mkfifo(out / "rows")),
    "a link": lambda out: linked(out, "rows"),
    "a linked record": lambda out: linked(out, "pairing.json"),
    "other rows": lambda out: (out / "rows").write_bytes(bytes((out / "rows").stat().st_size)),
    "a row beyond": lambda out: other_row(out, 1 << 40),
    "a row below": lambda out: other_row(out, -2),
    "an uncounted row": lambda out: other_row(out, -1),
    "other sizes": lambda out: (out / "sizes").write_bytes((np.fromfile(out / "sizes", "<i8") + 1).tobytes()),
    "a canary beyond": lambda out: forged(out, lambda record: record["canaries"][0].update(index=1 << 40)),
    "a canary below": lambda out: forged(out, lambda record: record["canaries"][0].update(index=-1)),
    "a view below": lambda out: forged(out, lambda record: record["canaries"][0].update(view=-1)),
    "a view beyond": lambda out: forged(out, lambda record: record["canaries"][0].update(view=1 << 40)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_pairing_is_refused_as_damage(name: str, sound: Path, tmp_path: Path) -> None:
    out = paired(sound, tmp_path / "p")
    DAMAGE[name](out)
    with pytest.raises(CacheError, match=r"p/|is no pairing"):
        open_cache(sound).pairing(out)


def test_canaries_of_another_size_are_damage(sound: Path, tmp_path: Path) -> None:
    out = paired(sound, tmp_path / "p")
    truncated(out, "canaries")
    with pytest.raises(CacheError, match="has 4600 bytes, the manifest implies 4608"):
        views(open_cache(sound), out, Things(SIDE // 2, order=range(COUNT - 1, -1, -1)))


@pytest.mark.parametrize(
    "dataset",
    [
        {"kind": "image_folder", "root": "s3://bucket/photos", "labelled": False},
        {"kind": "huggingface", "path": "somebody/photos"},
    ],
    ids=["url", "hugging_face"],
)
def test_a_place_that_only_the_record_names_needs_a_grant(dataset: Any, sound: Path, tmp_path: Path) -> None:
    out, cache = paired(sound, tmp_path / "p"), open_cache(sound)
    forged(out, lambda record: record.update(dataset=dataset))
    with pytest.raises(RefusedError, match=rf"trust: {cache.pairing(out).record.digest()}"):
        cache.views(pairing=cache.pairing(out))


def test_code_that_a_record_names_is_never_run(sound: Path, tmp_path: Path) -> None:
    out, cache = paired(sound, tmp_path / "p"), open_cache(sound)
    forged(out, lambda record: record.update(dataset={"kind": "custom", "factory": "os:abort"}))
    with pytest.raises(RecipeError, match="a cache never names code to run"):
        cache.views(pairing=cache.pairing(out), trust=(cache.pairing(out).record.digest(),))
    with pytest.raises(RecipeError, match="is a URL; a pairing is a folder"):
        cache.pairing("s3://bucket/p")


def test_a_control_run_gives_no_image_its_own_row(sound: Path, tmp_path: Path) -> None:
    out, cache = paired(sound, tmp_path / "p", Things(lost=(4,)), allow_unmatched=True), open_cache(sound)
    sources = cache.pairing(out, shuffled=True).sources
    assert sorted(sources.tolist()) == list(range(COUNT))
    assert np.flatnonzero(sources == np.arange(COUNT)).tolist() == [4]  # which nobody learns from
    plain, control = (
        cache.views(Things(lost=(4,)), pairing=cache.pairing(out, shuffled=shuffled)).dataset
        for shuffled in (False, True)
    )
    for row in (0, 7):
        assert torch.equal(control.read(row), plain.read(int(sources[row])))
    assert np.array_equal(control.labels, cache.labels[sources])


def test_the_commands_pair_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, folder, ending in ((SIDE, "photos", "png"), (SIDE // 2, "small", "bmp")):
        for number, pixels in enumerate(textured(COUNT, side, side)):
            file = tmp_path / folder / "ab"[number % 2] / f"{number}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    cache, out = str(tmp_path / "c.zarr"), str(tmp_path / "p")
    photos = {"kind": "image_folder", "root": str(tmp_path / "photos")}
    run(tmp_path / "c.zarr", dataset=photos, module=Linear(2, 16), views=SPEC)
    words = ["pair", cache, out, "--dataset", str(tmp_path / "small"), "--json"]
    assert main(words) == 2
    assert "--by stem" in capsys.readouterr().err
    assert main([*words, "--by", "stem", "--color", "{kind: color_jitter, brightness: 0.4}", "--size", "[8, 12]"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["unmatched"], found["image_shape"], found["note"]) == (COUNT, 0, [3, 8, 12], NOTE)
    assert main(["verify", cache, "--pairing", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == "the same"
    os.rename(tmp_path / "small", tmp_path / "moved")
    assert main(["verify", cache, "--pairing", out]) == 0
    assert "give --set dataset.root=…" in capsys.readouterr().out
    moved = ["--set", f"dataset.root={tmp_path / 'moved'}"]
    assert main(["verify", cache, "--pairing", out, *moved, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == "the same"
    Image.new("RGB", (12, 12)).save(tmp_path / "moved/a/0.bmp")
    assert main(["verify", cache, "--pairing", out, *moved]) == 4
    assert "images" in capsys.readouterr().err
    assert main(["verify", cache, "--pairing", out, "--repair", "r.yaml"]) == 2
    assert main([*words[:4], "{kind: image_foldr}"]) == 2
    assert "image_folder" in capsys.readouterr().err
