"""Exported ONNX files: those that tests/shipping/test_exported.py spoils."""

from hostile_cases.common import USAGE, Case
from tests.shipping.test_exported import SPOILT

EXPORTED = [
    Case(
        *("onnx", name, lambda folder, spoil=spoil: spoil(folder / "model.onnx")),
        {"predict file": (USAGE,)},
        *(("predict file",), ("predict file",)),
    )
    for name, (spoil, _) in SPOILT.items()
]
