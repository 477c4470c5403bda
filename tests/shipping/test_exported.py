"""Reading exported files of strangers: a broken, foreign or hostile one is refused before anything of it runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from logitcache.cli.app import main
from logitcache.errors import RecipeError
from logitcache.shipping import exported
from logitcache.shipping.exported import open_exported

onnx: Any = pytest.importorskip("onnx", reason="exports need the extra export")
helper: Any = onnx.helper


def changed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return what changes the graph of a file."""

    def spoil(file: Path) -> None:
        model = onnx.load(file)
        change(model)
        file.write_bytes(model.SerializeToString())

    return spoil


def metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what changes the metadata of a file."""

    def rewrite(model: Any) -> None:
        (entry,) = model.metadata_props
        found = json.loads(entry.value)
        change(found)
        entry.value = json.dumps(found)

    return changed(rewrite)


def node(kind: str, inputs: list[str], **attributes: Any) -> Callable[[Any], object]:
    """Return what adds an operator."""
    return lambda model: model.graph.node.append(helper.make_node(kind, inputs, [f"{kind}_out"], **attributes))


def outside(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def huge(model: Any) -> None:
    shape = onnx.numpy_helper.from_array(np.array([10**6, 10**6], np.int64), "huge")
    model.graph.initializer.append(shape)
    node("ConstantOfShape", ["huge"])(model)


def unknown(model: Any) -> None:
    node("Cast", ["logits"], to=onnx.TensorProto.INT64)(model)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), "flat"))
    node("Reshape", ["Cast_out", "flat"])(model)
    node("ConstantOfShape", ["Reshape_out"])(model)


def branch(model: Any) -> None:
    graph = helper.make_graph([], "inner", [], [])
    node("If", ["pixels"], then_branch=graph, else_branch=graph)(model)


def function(model: Any) -> None:
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [], []))


def wide(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 29


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), "no ONNX file|metadata"),
    "text": (lambda file: file.write_text("hello, this is no model" * 9), "no ONNX file"),
    "empty": (lambda file: file.write_bytes(b""), "no metadata of logitcache"),
    "foreign": (changed(lambda model: model.ClearField("metadata_props")), "no metadata of logitcache"),
    "weights elsewhere": (changed(outside), "other files"),
    "another library": (changed(node("Op", ["pixels"], domain="evil")), "'evil'"),
    "a graph inside": (changed(branch), "graph of its own"),
    "functions": (changed(function), "functions"),
    "a terabyte": (changed(huge), r"1e\+12 values"),
    "a size of values": (changed(unknown), "ConstantOfShape makes is not known"),
    "another width": (changed(wide), r"does not take the uint8 images \[1, 28, 28\]"),
    "two inputs": (changed(lambda m: m.graph.input.append(m.graph.input[0])), "2 inputs"),
    "an operator that is none": (changed(node("NoSuchOp", ["pixels"])), "fit together|cannot open"),
    "a factory": (
        metadata(lambda m: m["evaluation"]["augmentations"].append({"kind": "custom", "factory": "os:abort"})),
        "never called",
    ),
    "fewer classes": (metadata(lambda m: m.update(num_classes=9)), "10 names for 9 classes"),
    "another format": (metadata(lambda m: m.update(format=2)), "format"),
    "a size of 10^9": (metadata(lambda m: m.update(shape=[1, 10**9, 28])), "shape"),
    "1 TB": (lambda file: os.truncate(file, 1 << 40), "at most"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_files_are_refused_with_the_reason(
    name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, reason = SPOILT[name]
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    spoil(copy)
    if "cannot open" not in reason:
        monkeypatch.setattr(exported, "_onnxruntime", lambda: pytest.fail("it is opened"))
    Image.new("L", (30, 30)).save(tmp_path / "image.png")
    with pytest.raises(RecipeError, match=reason):
        open_exported(copy).session()
    assert main(["predict", str(copy), str(tmp_path / "image.png")]) == 2
    shown = capsys.readouterr().err
    assert "bug" not in shown
    assert "Fix: " in shown


def test_a_sound_file_is_opened(file: Path) -> None:
    assert open_exported(file).metadata.num_classes == 10


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.onnx"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    assert main(["predict", str(path), "image.png"]) == 2
    assert "bug" not in capsys.readouterr().err
