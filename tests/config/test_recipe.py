import contextlib
import json
import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from logitcache.config import yaml_text
from logitcache.config.recipe import (
    Component,
    Count,
    Float,
    Name,
    Positive,
    dump_recipe,
    load_recipe,
    read_recipe,
)
from logitcache.errors import RecipeError


class Folder(Component):
    kind: Literal["folder"] = "folder"
    root: str
    num_workers: int = 0


class Bundled(Component):
    kind: Literal["bundled"] = "bundled"
    fraction: Float = 1.0


Images = Annotated[Folder | Bundled, Field(discriminator="kind")]


class Sgd(Component):
    kind: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    momentum: Float = 0.9


class AdamW(Component):
    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3


class Loss(Component):
    weight: Float = 1.0
    reduction: Literal["mean", "sum"] = "mean"


class Run(Component):
    dataset: Images
    validation: Images | None = None
    optimizer: Annotated[Sgd | AdamW, Field(discriminator="kind")] = Sgd()
    losses: tuple[Loss, ...] = (Loss(),)
    steps: Annotated[tuple[Sgd, ...], Field(min_length=1)] = (Sgd(),)
    members: Annotated[tuple[Name, ...], Field(min_length=2)] = ("a", "b")
    teachers: dict[Name, Images] = Field(default_factory=dict)
    epochs: Count = 1
    size: int | tuple[int, int] | None = None
    title: str = ""
    compile: bool = False
    ema: Float | None = None


VALID = "dataset: {kind: bundled}\n"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, Run, overrides)

    return load


@pytest.fixture
def refuse(load, tmp_path):
    """Load a recipe that must be refused; returns the message without the folder's name."""

    def refuse(text, *overrides):
        with pytest.raises(RecipeError) as refused:
            load(text, *overrides)
        return str(refused.value).replace(f"{tmp_path}/", "")

    return refuse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("'3e-4'", 3e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("1", 1.0),
        ("+1e+2", 100.0),
        ("010", 10.0),
        ("0x10", 16.0),
        ("~", None),
        ("", None),
        ("null", None),
    ],
)
def test_numbers_are_those_of_yaml_1_2(load, text, value):
    assert load(VALID + f"ema: {text}").ema == value


@pytest.mark.parametrize("text", ["on", "off", "yes", "No", "y", "1:30", "2024-01-31", "1_000", "0b1", "=", "<<", "1e"])
def test_what_yaml_1_2_calls_text_stays_text(load, text):
    assert load(VALID + f"title: {text}").title == text


def test_keys_are_always_text(load):
    teachers = load(VALID + "teachers: {on: {kind: bundled}, 010: {kind: bundled}}").teachers
    assert list(teachers) == ["on", "010"]


@pytest.mark.parametrize("text", ["true", "'1'", "1.5", "one", "[1]", ".inf", "null"])
def test_what_is_not_a_whole_number_is_no_count(refuse, text):
    assert refuse(VALID + f"epochs: {text}").startswith("run.yaml:2: key 'epochs' = ")


@pytest.mark.parametrize("text", [".nan", ".inf", "1e999", "true"])
def test_numbers_must_be_finite_and_no_booleans(refuse, text):
    assert "run.yaml:2: key 'ema' = " in refuse(VALID + f"ema: {text}")


def test_five_mistakes_are_reported_together_with_line_key_and_suggestion(refuse):
    message = refuse(
        "dataset:\n"
        "  kind: foldr\n"
        "  root: 7\n"
        "optimizer:\n"
        "  kind: sgd\n"
        "  momentun: 0.9\n"
        "losses:\n"
        "- reduction: men\n"
        "epochs: true\n"
        "compile: on\n"
    )
    assert message.splitlines() == [
        "6 mistakes:",
        "  run.yaml:2: key 'dataset.kind' = \"foldr\": unknown kind; did you mean 'folder'?",
        "  run.yaml:3: key 'dataset.root' = 7: must be text; if it is meant as text, quote it: \"7\" "
        "(with --set: 'KEY=\"7\"')",
        "  run.yaml:6: key 'optimizer.momentun' = 0.9: unknown key; did you mean 'momentum'?",
        "  run.yaml:8: key 'losses.0.reduction' = \"men\": must be 'mean' or 'sum'; did you mean 'mean'?",
        "  run.yaml:9: key 'epochs' = true: must be a whole number",
        "  run.yaml:10: key 'compile' = \"on\": must be true or false; did you mean true?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 2", "run.yaml:1: key 'dataset' is missing"),
        ("epochs: 2\ndataset:\n  kind: folder", "run.yaml:2: key 'dataset.root' is missing"),
        ("datset: {kind: bundled}", "run.yaml:1: key 'datset'"),
        ("dataset: {root: x}", "key 'dataset.kind' is missing; use one of 'folder', 'bundled'"),
        ("dataset: bundle", "must be a mapping; did you mean {kind: bundled}?"),
        ("dataset: {kind: zip}", "unknown kind; use one of 'folder', 'bundled'"),
        (VALID + "epochs: 1e3", "did you mean 1000?"),
        (VALID + "epochs: '12'", "did you mean 12, without quotes?"),
        (VALID + "epochs: 0", "must be greater than or equal to 1"),
        (VALID + "losses: {weight: 1}", "key 'losses' = {\"weight\": 1}: must be a list"),
        (VALID + "size: big", "run.yaml:2: key 'size' = \"big\": must be a whole number or a list"),
        (VALID + "size: [1, x]", "run.yaml:2: key 'size.1' = \"x\": must be a whole number"),
        (VALID + "validation: {kind: bundled, fractoin: 1}", "did you mean 'fraction'?"),
        (VALID + "steps: []", "run.yaml:2: key 'steps' = []: give at least one"),
        (VALID + "steps: [{lr: no}]", "run.yaml:2: key 'steps.0.lr' = \"no\": must be a number"),
        (VALID + "members: [a]", "run.yaml:2: key 'members' = [\"a\"]: give at least 2"),
        (VALID + "members: [a, b c]", "run.yaml:2: key 'members.1' = \"b c\""),
        (VALID + "teachers: {a b: {kind: bundled}}", "run.yaml:2: key 'teachers.a b'"),
    ],
)
def test_a_mistake_is_explained_once(refuse, text, expected):
    message = refuse(text)
    assert expected in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml:1: the recipe is empty"),
        ("# nothing\n", "run.yaml:1: the recipe is empty"),
        ("- 1", "run.yaml:1: the recipe is [1], not a mapping"),
        (VALID + "epochs: [1", "run.yaml:2: not YAML"),
        ("dataset:\n\tkind: bundled", "run.yaml:2: not YAML: while scanning"),
        (VALID + "title: a: b", "quote text"),
        (VALID + "title: \x01", "run.yaml:2: not YAML: a control character"),
        (VALID + "title: *unknown", "run.yaml:2: not YAML: found undefined alias"),
        (VALID + "---\n" + VALID, "another document"),
        (VALID + "title: !!python/name:os.system x", "run.yaml:2: the tag"),
        (VALID + "title: !!binary aGk=", "run.yaml:2: the tag"),
        (VALID + "epochs: " + "9" * 5000, "cannot be read as a number"),
        (VALID + "? [a]\n: 1", "run.yaml:2: a key must be a word"),
        (VALID + "losses: &a [*a]", "run.yaml:2: aliases"),
        ("title: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(refuse, text, expected):
    assert expected in refuse(text)


def test_large_texts_are_parsed_by_libyaml_alone(refuse, load, monkeypatch):
    def slow(loader):
        raise AssertionError("tens of seconds for a megabyte")

    monkeypatch.setattr(yaml_text.Loader, "get_single_node", slow)
    assert "aliases (*name) grow without end" in refuse(VALID + "losses: [" + "1," * 400_000 + "1]")
    assert "run.yaml" in refuse(VALID + "losses: [" + "1," * 40_000)
    assert "unknown key" in refuse(VALID + "".join(f"k{number}: 1\n" for number in range(1000)))


def test_of_very_many_mistakes_a_hundred_are_described(refuse):
    text = refuse(VALID + "".join(f"k{number}: 1\n" for number in range(30_000)))
    assert text.count("unknown key") == 100
    assert "and 29900 more mistakes" in text
    assert len(text) < 50_000
    kinds = refuse(VALID + "losses: [" + "{kind: crossentropy}," * 3_000 + "]")
    assert "and 2900 more mistakes" in kinds


def test_aliases_that_multiply_are_refused(refuse):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "aliases" in refuse("\n".join(lines))


def test_a_key_that_appears_twice_is_refused(refuse):
    message = refuse(VALID + "epochs: 1\nepochs: 2\n")
    assert message == "run.yaml:3: key 'epochs' appears twice, first on line 2; remove one"


def test_an_alias_repeats_a_value(load):
    recipe = load("dataset: &images {kind: bundled}\nvalidation: *images")
    assert recipe.validation == recipe.dataset


def test_files_that_cannot_be_read_are_refused_with_a_fix(tmp_path):
    (tmp_path / "student.yaml").write_text(VALID)
    (tmp_path / "latin.yaml").write_bytes(b"# fine\ntitle: caf\xe9\n")
    for path, expected in [
        (tmp_path / "studnet.yaml", "student.yaml'?"),
        (tmp_path / "nowhere" / "x.yaml", "no such file"),
        (tmp_path, "is a folder; name a recipe in it (latin.yaml, student.yaml)"),
        (tmp_path / "latin.yaml", "latin.yaml:2: not UTF-8"),
        (tmp_path / "student.yaml" / "x", "student.yaml"),
    ]:
        with pytest.raises(RecipeError) as refused:
            load_recipe(path, Run)
        assert expected in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.encode())
    assert load_recipe(str(path), Run).dataset == Bundled()


def test_set_changes_values_at_any_depth(load):
    recipe = load(
        VALID + "losses: [{weight: 1}, {weight: 2}]\nteachers: {a: {kind: folder, root: x}}\n",
        "losses.1.weight=3e-4",
        "teachers.a.root=on",
        "teachers.b={kind: bundled}",
        "dataset={kind: folder, root: a=b}",
        "dataset.num_workers=2",
        "size=[3, 4]",
        "title=",
        "title=a=b",
    )
    assert recipe.losses == (Loss(weight=1), Loss(weight=3e-4))
    assert recipe.teachers == {"a": Folder(root="on"), "b": Bundled()}
    assert recipe.dataset == Folder(root="a=b", num_workers=2)
    assert recipe.size == (3, 4)
    assert recipe.title == "a=b"


def test_set_starts_from_the_default_of_what_the_recipe_leaves_out(load):
    recipe = load(VALID, "optimizer.lr=0.2", "losses.0.reduction=sum", "validation.kind=bundled")
    assert recipe.optimizer == Sgd(lr=0.2)
    assert recipe.losses == (Loss(reduction="sum"),)
    assert recipe.validation == Bundled()
    assert load(VALID, "optimizer.kind=adamw").optimizer == AdamW()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs=x", "--set epochs=x: key 'epochs' = \"x\": must be a whole number"),
        ("optimzer.lr=1", "--set optimzer.lr=1: key 'optimzer' = {\"lr\": 1}: unknown key; did"),
        ("optimizer.lt=1", "--set optimizer.lt=1: key 'optimizer.lt' = 1: unknown key; did you"),
        ("losses.1.weight=1", "--set losses.1.weight=1: 'losses' is a list with entries 0 to 0"),
        ("losses.first=1", "'losses' is a list with entries 0 to 0, not 'first'"),
        ("dataset.kind.x=1", "'dataset.kind' is \"bundled\", which has no key 'x'"),
        ("steps=[]", "--set steps=[]: key 'steps' = []: give at least one"),
        ("epochs", "--set epochs: write key=value"),
        ("=1", "--set =1: write key=value"),
        ("a..b=1", "--set a..b=1: write key=value"),
        ("title=[1", "--set title=[1: not YAML"),
    ],
)
def test_a_mistake_in_set_names_the_option(refuse, override, expected):
    message = refuse(VALID, override)
    assert message.startswith("--set")
    assert expected in message


def test_mistakes_of_the_file_and_of_set_are_reported_together(refuse):
    lines = refuse(VALID + "epochs: x\n", "losses.7=1", "title=1").splitlines()
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "run.yaml:2",
        "--set losses.7=1",
        "--set title=1",
    ]


def test_a_mapping_is_a_recipe_too():
    source = {"dataset": Folder(root="x"), "size": (1, 2), "title": Path("a/b")}
    assert load_recipe(source, Run, ["epochs=3"]) == Run(dataset=Folder(root="x"), size=(1, 2), title="a/b", epochs=3)
    assert source["dataset"] == Folder(root="x")
    with pytest.raises(RecipeError, match=r"^key 'epochs' = 0: must be"):
        load_recipe({"dataset": {"kind": "bundled"}, "epochs": 0}, Run)
    with pytest.raises(RecipeError, match="plain values"):
        load_recipe({"dataset": object()}, Run)


def test_plain_data_is_read_without_a_model(tmp_path):
    path = tmp_path / "any.yaml"
    path.write_text("a: {b: on}\n")
    assert read_recipe(path) == {"a": {"b": "on"}}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["on", "3e-4", "010", "1:30", "2024-01-31", "", " ", "~", "null", "-", "? a", "é\u2028\n ", "0x1"]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True) | st.sampled_from(
    ["on", "null", "010", "1e5", "true"]
)
images = st.builds(Folder, root=texts, num_workers=st.integers()) | st.builds(Bundled, fraction=floats)
runs = st.builds(
    Run,
    dataset=images,
    validation=st.none() | images,
    losses=st.lists(st.builds(Loss, weight=floats), max_size=3).map(tuple),
    teachers=st.dictionaries(names, images, max_size=3),
    epochs=st.integers(1, 2**70),
    size=st.none() | st.integers() | st.tuples(st.integers(), st.integers()),
    title=texts,
    compile=st.booleans(),
    ema=st.none() | floats,
)


@given(recipe=runs)
def test_a_dumped_recipe_is_read_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    text = dump_recipe(recipe)
    path.write_text(text, encoding="utf-8", newline="")
    assert load_recipe(path, Run) == recipe
    # YAML 1.1 readers, most of those in use, see the same values.
    assert yaml.safe_load(text) == json.loads(recipe.model_dump_json())


@given(value=floats)
def test_any_float_survives_set(value):
    recipe = load_recipe({"dataset": {"kind": "bundled"}}, Run, [f"ema={value!r}"])
    assert recipe.ema == value
    assert math.copysign(1, recipe.ema or 0.0) == math.copysign(1, value) or value == 0


@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_no_file_causes_another_error_than_a_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(path, Run)


@given(text=st.text(max_size=30))
def test_no_override_causes_another_error_than_a_recipe_error(text):
    with contextlib.suppress(RecipeError):
        load_recipe({"dataset": {"kind": "bundled"}}, Run, [text, f"title={text}"])
