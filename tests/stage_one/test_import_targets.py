"""Answers from files make the cache that the same teacher makes: views are written, answered elsewhere, imported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.errors import DataError, LogitCacheError, MismatchError, RecipeError
from logitcache.logits import log_probs
from logitcache.models import ImportedAnswers
from logitcache.stage_one.materialize.materialize import materialize
from logitcache.stage_one.precompute import precompute
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE16, DENSE32, ENCODINGS, Linear, contents, recipe, verified
from tests.cache.made import teacher as entry

PIXELS = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 90}}
KEPT = {"dataset": PIXELS, "shard_rows": 40, "batch_size": 20, "row_checksums": True}
HEAD = {"kind": "head", "dtype": "float32"}


class Tower(nn.Module):
    """Two matrices, whose answers do not depend on the size of the batch, with the input of the second as a feature."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(48, 6, generator=generator))
        self.features = nn.Identity()
        self.second = nn.Parameter(torch.randn(6, 16, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features((images.flatten(1).double() @ self.first.double()).float())
        return (features.double() @ self.second.double()).float()  # type: ignore[no-any-return]


def views(out: Path, cache: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Materialize the views of the recipe as NPZ; return all rows."""
    materialize(recipe(cache, **{**KEPT, **changes}), out, form="npz")
    files = [np.load(file) for file in sorted(out.glob("*.npz"))]
    return {name: np.concatenate([file[name] for file in files]) for name in ("key", "id", "crc32", "pixels")}


@torch.no_grad()
def answered(rows: dict[str, np.ndarray], network: nn.Module) -> dict[str, np.ndarray]:
    """Let a network answer elsewhere, one view at a time: mean 0.5 and std 0.5, as the recipe's."""
    found, features = [], []
    for pixels in rows["pixels"]:
        scaled = torch.from_numpy(pixels)[None].float().div_(255).sub_(0.5).div_(0.5)
        if isinstance(network, Tower):
            network.features.register_forward_hook(lambda _, __, output: features.append(output[0].numpy()))
            found.append(network(scaled)[0].numpy())
            network.features._forward_hooks.clear()
        else:
            found.append(network(scaled)[0].numpy())
    answers = {"key": rows["key"], "crc32": rows["crc32"], "logits": np.stack(found)}
    return answers | ({"features": np.stack(features)} if features else {})


def write_npz(path: Path, answers: dict[str, np.ndarray]) -> None:
    np.savez(path, **answers)


def write_jsonl(path: Path, answers: dict[str, np.ndarray]) -> None:
    columns = {name: column.tolist() for name, column in answers.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, answers: dict[str, np.ndarray]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra hf")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: column.tolist() for name, column in answers.items()}), path)


WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray]], None]] = {
    "npz": write_npz,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def imported(path: Path, **fields: Any) -> dict[str, Any]:
    return {"kind": "answers", "path": str(path), "whose": "a matrix", **fields}


def stored(cache: Path) -> dict[str, bytes]:
    """All files but the root, which states whose answers they are."""
    return {name: content for name, content in contents(cache).items() if name != "zarr.json"}


@pytest.fixture
def answers(tmp_path: Path) -> dict[str, np.ndarray]:
    return answered(views(tmp_path / "views", tmp_path / "x.zarr"), Linear(16))


@pytest.mark.parametrize("name", ENCODINGS)
def test_imported_answers_are_stored_byte_for_byte_as_the_teachers_own(name: str, tmp_path: Path) -> None:
    answers = answered(views(tmp_path / "views", tmp_path / "x.zarr"), Linear(16))
    write_npz(tmp_path / "a.npz", answers)
    kept = {"teachers": {"t": entry(ENCODINGS[name])}, **KEPT}
    precompute(recipe(tmp_path / "own.zarr", **kept), teachers={"t": Linear(16)})
    kept = {"teachers": {"t": entry(ENCODINGS[name], model=imported(tmp_path / "a.npz"))}, **KEPT}
    result = precompute(recipe(tmp_path / "imported.zarr", **kept))
    assert result.teacher_passes == 0
    assert stored(tmp_path / "imported.zarr") == stored(tmp_path / "own.zarr")
    own, made = (open_cache(tmp_path / f"{name}.zarr").manifest for name in ("own", "imported"))
    assert made.teachers["t"].errors == own.teachers["t"].errors
    assert made.teachers["t"].model["whose"] == "a matrix"  # type: ignore[call-overload,index]
    assert made.teachers["t"].model["pixels"] == "proven"  # type: ignore[call-overload,index]
    assert verified(tmp_path / "imported.zarr") == ()


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_of_file_gives_the_same_cache(form: str, answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    half = len(answers["key"]) // 2
    (tmp_path / "answers").mkdir()
    for number, rows in enumerate((slice(half, None), slice(None, half))):  # in any order, in several files
        part = {name: column[rows] for name, column in answers.items()}
        WRITERS[form](tmp_path / f"answers/{number}.{form}", part)
    model = imported(tmp_path / "answers")
    precompute(recipe(tmp_path / "i.zarr", **KEPT, teachers={"t": entry(DENSE32, model=model)}))
    precompute(recipe(tmp_path / "o.zarr", **KEPT, teachers={"t": entry(DENSE32)}), teachers={"t": Linear(16)})
    assert stored(tmp_path / "i.zarr") == stored(tmp_path / "o.zarr")


def test_features_are_tapped_by_the_names_of_their_columns(tmp_path: Path) -> None:
    rows = answered(views(tmp_path / "views", tmp_path / "x.zarr"), Tower())
    write_npz(tmp_path / "a.npz", rows)
    features = {"last": {"kind": "maps", "tap": "features", "dtype": "float32"}}
    kept = {"teachers": {"t": entry(DENSE16, features=features)}, **KEPT}
    precompute(recipe(tmp_path / "o.zarr", **kept), teachers={"t": Tower()})
    kept["teachers"]["t"]["model"] = imported(tmp_path / "a.npz")  # type: ignore[index]
    precompute(recipe(tmp_path / "i.zarr", **kept))
    assert stored(tmp_path / "i.zarr") == stored(tmp_path / "o.zarr")
    kept["teachers"]["t"]["logits"] = None  # type: ignore[index]
    precompute(recipe(tmp_path / "f.zarr", **kept))
    assert open_cache(tmp_path / "f.zarr").manifest.targets == {"t": ("last",)}


def test_the_most_probable_classes_are_kept_with_their_probabilities(
    answers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    exact = torch.from_numpy(answers["logits"]).double().log_softmax(dim=1)
    top = exact.topk(2, dim=1)
    part = {name: answers[name] for name in ("key", "crc32")}
    part |= {"classes": top.indices.numpy(), "log_probabilities": top.values.numpy()}
    write_npz(tmp_path / "a.npz", part)
    with pytest.raises(DataError, match=r"num_classes"):
        ImportedAnswers(path=str(tmp_path / "a.npz"), whose="x").build(None, 3)
    model = imported(tmp_path / "a.npz", num_classes=16)
    precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": entry({"kind": "top_k", "k": 2}, model=model)}))
    keys = [ViewKey(*map(int, key.split("/"))) for key in answers["key"]]
    found = log_probs(open_cache(tmp_path / "c.zarr").answers(keys)["t"].logits).double()
    # The pairs are kept in half precision; all that is left is shared by the other classes.
    torch.testing.assert_close(found.gather(1, top.indices), top.values, atol=5e-3, rtol=2e-3)
    rest = found.exp().scatter(1, top.indices, 0.0)
    torch.testing.assert_close(rest.sum(1), 1 - top.values.exp().sum(1), atol=5e-3, rtol=0)


REFUSED: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "a view is not answered": (lambda a: [a.update({n: c[:-100] for n, c in a.items()})], r"has no answer to"),
    "an answer is there twice": (lambda a: a["key"].__setitem__(1, a["key"][0]), "answers 0/0 twice"),
    "a key of another form": (lambda a: a["key"].__setitem__(1, "x"), "the key 'x' is not VIEW/IMAGE"),
    "no keys": (lambda a: a.pop("key"), "no column 'key'"),
    "no answers": (lambda a: a.pop("logits"), "has no answers"),
    "too few rows": (lambda a: a.update(logits=a["logits"][1:]), "rows of numbers"),
    "text": (lambda a: a.update(logits=a["logits"].astype(str)), "rows of numbers"),
    "other pixels": (lambda a: a["crc32"].__setitem__(slice(None), 7), r"is to other pixels(.|\n)*materialize"),
    "no proof": (lambda a: a.pop("crc32"), r"no column crc32(.|\n)*pixels: trusted"),
    "pairs of one": (lambda a: a.update(log_probabilities=a.pop("logits")), "classes and log_probabilities belong"),
    "no logits": (lambda a: a.update(probabilities=a.pop("logits")), "answers probabilities, and no logits"),
    "inf": (lambda a: a["logits"].__setitem__(slice(None), np.inf), "inf or nan"),
    "a dotted name": (lambda a: a.update({"layer4.pool": a["logits"]}), "column 'layer4.pool', which cannot be tapped"),
    "a name of torch's": (lambda a: a.update(forward=a["logits"]), "column 'forward', which cannot be tapped"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_answer_is_refused_with_the_fix(name: str, answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    spoil, named = REFUSED[name]
    spoil(answers)
    write_npz(tmp_path / "a.npz", answers)
    with pytest.raises(LogitCacheError, match=named) as raised:
        precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": entry(model=imported(tmp_path / "a.npz"))}))
    assert "Fix:" in str(raised.value)
    assert (tmp_path / "c.zarr").exists() == (name == "inf")  # found by the loop, as for every teacher


def test_answers_without_proof_are_trusted_if_the_recipe_says_so(
    answers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    crc32 = answers.pop("crc32")
    write_npz(tmp_path / "a.npz", answers)
    model = imported(tmp_path / "a.npz", pixels="trusted")
    precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": entry(model=model)}))
    assert open_cache(tmp_path / "c.zarr").manifest.teachers["t"].model["pixels"] == "trusted"  # type: ignore[call-overload,index]
    write_npz(tmp_path / "a.npz", answers | {"crc32": crc32 + 1})  # given, they are compared all the same
    with pytest.raises(MismatchError, match="other pixels"):
        precompute(recipe(tmp_path / "d.zarr", **KEPT, teachers={"t": entry(model=model)}))


def test_answers_that_a_part_lacks_are_named_before_anything_is_written(
    answers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    sparse = {"views": {**recipe(tmp_path).views.model_dump(mode="json"), "num_views": 1}}
    kept = {**KEPT, **sparse, "teachers": {"t": entry(model=imported(tmp_path / "a.npz"))}}
    precompute(recipe(tmp_path / "w.zarr", **{**kept, "teachers": {"t": entry()}}), teachers={"t": Linear(16)})
    tried = {(one.view, one.index) for one in open_cache(tmp_path / "w.zarr").manifest.canaries}
    lacking = next(index for index in range(40, 80) if (0, index) not in tried)  # of the second shard of 40
    write_npz(tmp_path / "a.npz", {name: np.delete(column, lacking, axis=0) for name, column in answers.items()})
    for part in (None, "2/3"):
        with pytest.raises(DataError, match=rf"no answer to 1 of \d+ views: 0/{lacking} "):
            precompute(recipe(tmp_path / "c.zarr", **kept), part=part)
        assert not (tmp_path / "c.zarr").exists()
    assert precompute(recipe(tmp_path / "c.zarr", **kept), part="1/3").shards_written == 1


def test_names_of_images_beside_answers_are_not_read(answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", answers | {"id": np.array([f"photo {n}" for n in range(180)])})
    precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": entry(model=imported(tmp_path / "a.jsonl"))}))
    assert open_cache(tmp_path / "c.zarr").manifest.teachers["t"].num_classes == 16


def test_other_files_of_answers_are_another_teacher_and_the_fix_imports_all_of_them(
    answers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    write_npz(tmp_path / "a/0.npz", answers)
    kept = {**KEPT, "teachers": {"t": entry(model=imported(tmp_path / "a"))}}
    precompute(recipe(tmp_path / "c.zarr", **kept))
    more = {"views": {**recipe(tmp_path).views.model_dump(mode="json"), "num_views": 3}}
    with pytest.raises(DataError, match="no answer to"):
        precompute(recipe(tmp_path / "c.zarr", **{**kept, **more}))
    assert verified(tmp_path / "c.zarr") == ()
    before = set(answers["key"].tolist())
    every = answered(views(tmp_path / "more", tmp_path / "x.zarr", **more), Linear(16))
    new = np.array([key not in before for key in every["key"].tolist()])
    write_npz(tmp_path / "a/1.npz", {name: column[new] for name, column in every.items()})
    with pytest.raises(MismatchError, match=r"teachers\.t\.weights(.|\n)*Fix: .*import all of them into another"):
        precompute(recipe(tmp_path / "c.zarr", **{**kept, **more}))
    assert precompute(recipe(tmp_path / "d.zarr", **{**kept, **more})).row_views == 270


def test_what_files_cannot_answer_is_refused_with_the_fix(answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", answers | {"mine": np.zeros((180, 5))})
    for changes, named in (
        ({"features": {"x": {"kind": "grad_cam", "tap": "mine"}}}, "grad_cam takes a network"),
        ({"logits": {"kind": "head"}}, "the network has none. Fix: another kind, as dense"),
        ({"speed": "auto"}, "leave speed out"),
        ({"features": {"x": {"kind": "pooled", "tap": "their"}}}, "tap one of its modules: mine"),
        ({"model": imported(Path("s3://bucket/a.npz"))}, "holds no answers"),
    ):
        source = {"t": {**entry(model=imported(tmp_path / "a.npz")), **changes}}
        with pytest.raises(RecipeError, match=named):
            precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers=source))
    url = {"kind": "answers", "path": "s3://bucket/a.npz", "whose": "x"}
    with pytest.raises(RecipeError, match=r"answers at a URL(.|\n)*s3://bucket/a\.npz(.|\n)*copy them"):
        precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": entry(model=url)}))
    with pytest.raises(RecipeError, match="whose"):
        recipe(tmp_path / "c.zarr", teachers={"t": entry(model=url | {"whose": ""})})


def test_files_of_other_numbers_of_classes_are_refused(answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_npz(tmp_path / "0.npz", {name: column[:90] for name, column in answers.items()})
    one = {name: column[90:] for name, column in answers.items()}
    write_npz(tmp_path / "1.npz", one | {"logits": one["logits"][:, :1]})
    with pytest.raises(RecipeError, match=r"1\.npz' answers logits \[1\], and '.*0\.npz' logits \[16\]"):
        ImportedAnswers(path=str(tmp_path), whose="x").build(None, 3)


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    for ending in ("npz", "jsonl"):
        (tmp_path / f"a.{ending}").write_bytes(b"PK not an archive")
        with pytest.raises(DataError, match=rf"a\.{ending}' cannot be used(.|\n)*Fix"):
            ImportedAnswers(path=str(tmp_path / f"a.{ending}"), whose="x").build(None, 3)
    np.savez(tmp_path / "b.npz", key=np.array([print], dtype=object))
    with pytest.raises(DataError, match=r"b\.npz' cannot be used(.|\n)*allow_pickle"):
        ImportedAnswers(path=str(tmp_path / "b.npz"), whose="x").build(None, 3)
    for path in ("none", "."):
        with pytest.raises(RecipeError, match=r"holds no answers(.|\n)*\.jsonl"):
            ImportedAnswers(path=str(tmp_path / path / "x"), whose="x").build(None, 3)


def test_answers_are_no_student_and_are_not_asked_online(answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", answers)
    model = imported(tmp_path / "a.npz")
    with pytest.raises(RecipeError, match="train nothing"):
        ImportedAnswers(**model).build(3, 3)
    precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": entry(model=model)}))
    live = live_targets(str(tmp_path / "c.zarr"), "cpu")
    with pytest.raises(RecipeError, match=r"answers no other images(.|\n)*without --online"):
        live(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))


def test_the_command_imports_by_the_recipe_of_precompute_in_parts(
    answers: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_npz(tmp_path / "a.npz", answers)
    file = tmp_path / "r.yaml"
    file.write_text(
        f"{{cache: {tmp_path}/c.zarr, dataset: {json.dumps(PIXELS)}, num_workers: 0, device: cpu, shard_rows: 40, "
        f"batch_size: 20, row_checksums: true, views: {recipe(tmp_path).views.model_dump_json()}, "
        f"teachers: {{t: {json.dumps(entry())}}}}}"
    )
    command = ["import-targets", str(file), str(tmp_path / "a.npz"), "--whose", "a matrix: 16 classes"]
    assert main([*command, "--part", "1/2"]) == 0
    assert main([*command, "--part", "2/2"]) == 0
    assert main(["verify", str(tmp_path / "c.zarr")]) == 0
    precompute(recipe(tmp_path / "o.zarr", **KEPT, teachers={"t": entry()}), teachers={"t": Linear(16)})
    assert stored(tmp_path / "c.zarr") == stored(tmp_path / "o.zarr")
    assert main([*command, "--json"]) == 0
    capsys.readouterr()
    assert main([*command, "--teacher", "u"]) == 2
    assert "teachers.u" in capsys.readouterr().err
    capsys.readouterr()
    model = f"teachers.t.model={json.dumps(imported(tmp_path / 'a.npz'))}"
    assert main(["plan", str(file), "--set", model, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["teacher_passes"], planned["break_even_students"]) == (0, None)
    write_npz(tmp_path / "f.npz", answers | {"mine": np.zeros((180, 3, 2, 2))})
    model = f"teachers.t.model={json.dumps(imported(tmp_path / 'f.npz'))}"
    assert main(["plan", str(file), "--set", model, "--set", f"cache={tmp_path}/f.zarr", "--taps", "--json"]) == 0
    [tap] = json.loads(capsys.readouterr().out)["taps"]
    assert (tap["tap"], tap["shape"], tap["pooled_row_bytes"], tap["maps_row_bytes"]) == ("mine", [3, 2, 2], 6, 24)
