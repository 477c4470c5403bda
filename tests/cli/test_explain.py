"""`recipe explain` and `recipe schema`: keys of recipes, without the models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.cli.app import main
from logitcache.config.recipe_keys import explain
from logitcache.report.recipe_check import RECIPES
from logitcache.student.losses.kl_divergence import KLDivergence

PAGE = Path(__file__).parents[2] / "docs/reference/recipes.md"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["recipe", *words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_key_is_described_by_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "losses.kl_divergence.temperature", "--json")
    field = KLDivergence.model_fields["temperature"]
    assert code == 0
    (key,) = json.loads(out)["keys"]
    assert key["description"] == field.description
    assert key["default"] == 1.0
    assert key["examples"] == field.examples
    assert key["type"] == "number or schedule"
    assert key["recipes"] == ["train-student"]
    assert "linear" in key["below"]
    assert key["link"].endswith("#loss-kl_divergence")


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("losses", {"losses"}),
        ("dataset.image_folder", {"dataset.image_folder"}),
        ("teachers.timm.options", {"teachers.NAME.model.timm.options"}),
        ("teachers.mine.model", {"teachers.NAME.model"}),
        ("losses.0.weight", None),
        ("optimizer.lr", {"optimizer.sgd.lr", "optimizer.adamw.lr"}),
        ("views.augmentations.random_crop.padding", {"views.augmentations.random_crop.padding"}),
        ("tap_layouts.layer4", {"tap_layouts.NAME"}),
        ("train-student.ensembles.both.mean.weights", {"ensembles.NAME.mean.weights"}),
        ("", set(RECIPES)),
    ],
)
def test_levels_may_be_left_out_or_stand_for_names_of_ones_own(asked: str, names: set[str] | None) -> None:
    found = {key.name for key in explain(asked)}
    assert found == names or (names is None and "losses.kl_divergence.weight" in found)


def test_a_range_is_part_of_the_type(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "explain", "losses.crd.momentum")
    assert "number ≥ 0 and ≤ 1" in out
    _, out, _ = run(capsys, "explain", "views.num_views")
    assert "whole number ≥ 1" in out
    assert "num_views: 1" in out


@pytest.mark.parametrize(
    ("wrong", "near", "parent"),
    [
        ("losses.kl_divergence.temprature", "temperature", "losses.kl_divergence"),
        ("loses.dkd", "losses", ""),
        ("dataset.image_foldr", "image_folder", "dataset"),
        ("dataset.rot", "root", "dataset"),
    ],
)
def test_a_wrong_key_gets_the_nearest(capsys: pytest.CaptureFixture[str], wrong: str, near: str, parent: str) -> None:
    code, _, error = run(capsys, "explain", wrong)
    assert code == 2
    assert f"Did you mean '{near}'?" in error
    assert f"`{f'logitcache recipe explain {parent}'.strip()}`" in error


@pytest.mark.parametrize("command", RECIPES)
def test_every_key_and_kind_is_found_by_its_full_name_and_linked_to_a_heading(command: str) -> None:
    anchors = {
        line.lstrip("# ").replace("`", "").lower().replace(" ", "-")
        for line in PAGE.read_text().splitlines()
        if line.startswith("#")
    }
    waiting = explain(command)
    seen = set()
    while waiting:
        key = waiting.pop()
        assert key.link.partition("#")[2] in anchors, key.name
        for child, _ in key.children():
            if child.path != key.path and child.name not in seen:
                seen.add(child.name)
                waiting.append(child)
                names = [one.name for one in explain(f"{command}.{child.name}")]
                assert child.name in names
    assert len(seen) > 20


def test_without_a_kind_the_kinds_of_schemas_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert (code, out.split()) == (0, list(RECIPES))


@pytest.mark.parametrize("command", RECIPES)
def test_the_schema_of_each_command_is_printed(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, "schema", command)
    assert code == 0
    assert json.loads(out)["title"] == command
    code, _, error = run(capsys, "schema", command[:-1])
    assert code == 2
    assert f"Did you mean '{command}'?" in error


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from logitcache.cli.app import main\n"
        "for words in (['explain', 'lr'], ['schema', 'derive'], ['explain', '--help']): main(['recipe', *words])\n"
        "sys.exit(sorted({'torch', 'zarr', 'numpy'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
