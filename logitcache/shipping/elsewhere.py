"""Commands that bring an exported file to other runtimes."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitcache.shipping.graph import INPUT
from logitcache.shipping.metadata import Metadata

_BATCHES = {"min": 1, "opt": 32, "max": 256}


@dataclass(frozen=True)
class Elsewhere:
    """What another runtime does with a file; `tried`: whether we ran such a command, on a file of our own."""

    runtime: str
    tried: Literal["run", "not run"]
    command: str


def commands_elsewhere(file: Path, metadata: Metadata, symmetric: bool = False) -> tuple[Elsewhere, ...]:
    """Return the commands for a file of `metadata`; TensorRT takes int8 with `symmetric` activations alone."""
    if file.suffix == ".pt2":
        codes = _from_pt2(file).items()
        return tuple(Elsewhere(name, "not run", shlex.join(["python", "-c", code])) for name, code in codes)
    image = "x".join(map(str, metadata.shape))
    model, xml, engine = (
        shlex.quote(str(path)) for path in (file, file.with_suffix(".xml"), file.with_suffix(".plan"))
    )
    shapes = " ".join(f"--{name}Shapes={INPUT}:{batch}x{image}" for name, batch in _BATCHES.items())
    is_float = metadata.arithmetic == "float32"
    found = [
        Elsewhere("OpenVINO", "run", f"benchmark_app -m {model} -d CPU -data_shape '[8,{image.replace('x', ',')}]'"),
        Elsewhere("OpenVINO", "run", f"ovc {model} --output_model {xml}"),
    ]
    if is_float or symmetric:
        option = "--fp16" if is_float else "--int8"
        command = f"trtexec --onnx={model} {option} {shapes} --saveEngine={engine}"
        found.append(Elsewhere("TensorRT", "not run", command))
    if is_float:
        folder = shlex.quote(f"{file.with_suffix('')}_tflite")
        found.append(Elsewhere("LiteRT", "not run", f"onnx2tf -i {model} -o {folder}"))
    return tuple(found)


def _from_pt2(file: Path) -> dict[str, str]:
    # Text of JSON is text of Python, and has no single quotes of its own, which a shell would want escaped.
    here, package, program = (
        json.dumps(str(path)) for path in (file, file.with_suffix(".mlpackage"), file.with_suffix(".pte"))
    )
    loaded = f"torch.export.load({here})"
    return {
        "Core ML": f"import coremltools, torch; coremltools.convert({loaded}).save({package})",
        "executorch": "import torch; from executorch.exir import to_edge_transform_and_lower as lower; "
        "from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner; "
        f"lower({loaded}, partitioner=[XnnpackPartitioner()]).to_executorch().save({program})",
    }
