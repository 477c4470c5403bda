"""Commands for other runtimes: those that are marked as run are run, and the page shows what is printed."""

import ast
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.cli.app import main
from logitcache.shipping.elsewhere import commands_elsewhere
from logitcache.shipping.exported import open_exported
from tests.shipping.test_export import answers, pixels

pytest.importorskip("onnxscript", reason="exports need the extra export")
onnx: Any = pytest.importorskip("onnx")
PAGE = Path(__file__).parents[2] / "docs/how-to/ship-a-student.md"


@pytest.mark.parametrize("name", ["student.onnx", "student.int8.onnx", "student.pt2"])
def test_the_page_shows_the_commands(name: str, file: Path) -> None:
    metadata = open_exported(file).metadata
    arithmetic = "int8" if "int8" in name else "float32"
    shown = metadata.model_copy(update={"shape": (3, 224, 224), "arithmetic": arithmetic})
    text = " ".join(PAGE.read_text().replace("\\\n", " ").split())
    for one in commands_elsewhere(Path(name), shown, symmetric=True):
        assert f"{one.runtime} ({one.tried}): {one.command}" in text


def test_names_with_spaces_and_quotes_are_one_word_of_a_shell_and_one_text_of_python(file: Path) -> None:
    metadata = open_exported(file).metadata
    for one in commands_elsewhere(Path("it's mine/a b.onnx"), metadata):
        assert any("it's mine/a b" in word for word in shlex.split(one.command))
    for one in commands_elsewhere(Path("it's mine/a b.pt2"), metadata):
        program, option, code = shlex.split(one.command)
        assert (program, option) == ("python", "-c")
        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert texts[0] == "it's mine/a b.pt2" or texts[-1] == "it's mine/a b.pt2"


def test_openvino_computes_what_onnxruntime_does(file: Path) -> None:
    openvino: Any = pytest.importorskip("openvino", reason="needs the extra openvino")
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = pixels().numpy()
    own, found = answers(file, images), compiled(images)[compiled.output(0)]
    assert np.abs(own - found).max() < 1e-4 * max(1.0, np.abs(own).max())


def test_commands_that_are_marked_as_run_are_run(run: Path, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    tools = Path(sys.executable).parent
    shutil.copy(file, tmp_path / "model.onnx")
    found = commands_elsewhere(tmp_path / "model.onnx", open_exported(file).metadata)
    lines = [one.command for one in found if one.tried == "run"]
    assert len(lines) == 2
    for line in lines:
        program, *words = shlex.split(line)
        short = ["-t", "1"] if program == "benchmark_app" else []
        subprocess.run([tools / program, *words, *short], check=True, capture_output=True, timeout=300, cwd=tmp_path)
    assert (tmp_path / "model.xml").stat().st_size > 0


def test_symmetric_activations_have_their_zero_at_0_and_get_a_line_of_tensorrt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {}
    for name, option in (("plain", []), ("symmetric", ["--symmetric"])):
        words = [str(tmp_path / f"{name}.onnx"), "--images", "20", "--least-agreement", "0.5", "--json"]
        assert main(["quantize", str(run), *words, *option]) == 0
        made[name] = json.loads(capsys.readouterr().out)
    lines = {name: [one["command"] for one in found["elsewhere"]] for name, found in made.items()}
    assert [sum("trtexec" in line for line in found) for found in lines.values()] == [0, 1]
    graph = onnx.load(tmp_path / "symmetric.onnx").graph
    zeros = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    points = [zeros[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(points) >= 6
    assert all(point.dtype == np.int8 and not point.any() for point in points)
    assert main(["quantize", str(run), str(tmp_path / "x.onnx"), "--symmetric", "--method", "pt2e"]) == 2
