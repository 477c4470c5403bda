"""A cache of features of every kind, and every loss on them, with weights under which none drowns the others."""

from pathlib import Path
from typing import Any

from tests.student.small import fill

HEAD = {"kind": "head", "dtype": "float32"}
FEATURES: dict[str, dict[str, Any]] = {
    "maps": {"kind": "maps", "tap": "0", "dtype": "float32"},
    "attention": {"kind": "attention", "tap": "0", "dtype": "float32"},
    "cam": {"kind": "grad_cam", "tap": "0", "dtype": "float32"},
}
MAPS = {"student": "0", "feature": "maps"}
VECTORS = {"student": "3:input", "feature": "penultimate"}
ON_FEATURES: dict[str, dict[str, Any]] = {
    "hint": {**MAPS, "weight": 10.0},
    "vid": {**MAPS, "weight": 0.1},
    "attention_transfer": {**MAPS, "feature": "attention", "weight": 100.0},
    "grad_cam": {**MAPS, "feature": "cam", "weight": 10.0},
    "similarity": {**MAPS, "weight": 100.0},
    "rkd": {**VECTORS, "weight": 0.1},
    "pkt": {**VECTORS, "weight": 1000.0},
    "cka": {**VECTORS},
    "srrl": {**VECTORS},
    "crd": {**VECTORS, "num_negatives": 50, "size": 16, "weight": 0.1},
}
LOSSES = [{"kind": "cross_entropy"}, *({"kind": kind, **fields} for kind, fields in ON_FEATURES.items())]


def fill_featured(path: Path, **changes: Any) -> Path:
    """Fill a cache of features, and of logits as what the last layer makes of `penultimate`, in float32."""
    return fill(path, logits=HEAD, **{"features": FEATURES, **changes})
