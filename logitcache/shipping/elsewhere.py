"""Commands that bring an exported file to other runtimes."""

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
        return tuple(Elsewhere(name, "not run", f'python -c "{code}"') for name, code in _from_pt2(file).items())
    image = "x".join(map(str, metadata.shape))
    shapes = " ".join(f"--{name}Shapes={INPUT}:{batch}x{image}" for name, batch in _BATCHES.items())
    is_float = metadata.arithmetic == "float32"
    found = [
        Elsewhere("OpenVINO", "run", f"benchmark_app -m {file} -d CPU -data_shape [8,{image.replace('x', ',')}]"),
        Elsewhere("OpenVINO", "run", f"ovc {file} --output_model {file.with_suffix('.xml')}"),
    ]
    if is_float or symmetric:
        option, engine = "--fp16" if is_float else "--int8", file.with_suffix(".plan")
        command = f"trtexec --onnx={file} {option} {shapes} --saveEngine={engine}"
        found.append(Elsewhere("TensorRT", "not run", command))
    if is_float:
        found.append(Elsewhere("LiteRT", "not run", f"onnx2tf -i {file} -o {file.with_suffix('')}_tflite"))
    return tuple(found)


def _from_pt2(file: Path) -> dict[str, str]:
    program = f"torch.export.load('{file}')"
    return {
        "Core ML": "import coremltools, torch; "
        f"coremltools.convert({program}).save('{file.with_suffix('.mlpackage')}')",
        "executorch": "import torch; from executorch.exir import to_edge_transform_and_lower as lower; "
        "from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner; "
        f"lower({program}, partitioner=[XnnpackPartitioner()]).to_executorch().save('{file.with_suffix('.pte')}')",
    }
