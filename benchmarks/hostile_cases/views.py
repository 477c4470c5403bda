"""What a manifest names as views."""

from typing import Any

from hostile_cases.common import Case, forge
from hostile_cases.datasets import IMAGES


def view(name: str, entry: Any, **views: Any) -> Case:
    """Let the manifest name other augmentations."""

    def change(manifest: dict[str, Any]) -> None:
        if entry is not None:
            manifest["views"]["augmentations"] = [entry, {"kind": "center_crop", "size": [8, 8]}]
        manifest["views"].update(views)

    ends = IMAGES | {"suspects": IMAGES["train"]}  # it looks whether the images have changed
    return Case("views", name, lambda folder: forge(folder, change), ends, ("verify", "train"))


def torchvision_view(name: str, **options: Any) -> dict[str, Any]:
    """Write the entry of a transform of torchvision."""
    import torchvision

    return {
        **{"kind": "torchvision", "name": name, "options": options, "size": None},
        "torchvision_version": torchvision.__version__,
    }


VIEWS = [
    view(
        "a factory",
        {"kind": "custom", "factory": "os:system", "arguments": {}, "size": None, "torchvision_version": None},
    ),
    view(
        "resize to 10^6",
        {"kind": "resize", "size": [10**6, 10**6], "interpolation": "bilinear", "kernel": "torchvision"},
    ),
    view(
        "exact resize to 10^6",
        {"kind": "resize", "size": [10**6, 10**6], "interpolation": "bilinear", "kernel": "exact"},
    ),
    view(
        "padding of 10^6",
        {"kind": "random_crop", "size": [8, 8], "padding": 10**6, "padding_mode": "constant", "fill": 0},
    ),
    view(
        "crop of 10^9",
        {"kind": "random_crop", "size": [10**9, 10**9], "padding": 0, "padding_mode": "constant", "fill": 0},
    ),
    view(
        "blur of 10^7 + 1",
        {"kind": "gaussian_blur", "kernel_size": [10**7 + 1, 10**7 + 1], "sigma": [0.1, 2.0], "p": 1.0},
    ),
    view("10^9 operations", {"kind": "rand_augment", "num_ops": 10**9, "magnitude": 9, "num_magnitude_bins": 31}),
    view("10^9 bins", {"kind": "trivial_augment_wide", "num_magnitude_bins": 10**9}),
    view("a Lambda", torchvision_view("Lambda", lambd="os.system")),
    view("a Resize of 10^6", torchvision_view("Resize", size=[10**6, 10**6])),
    view("a Pad of 10^6", torchvision_view("Pad", padding=10**6)),
    view("a thousand flips", None, augmentations=[{"kind": "horizontal_flip", "p": 0.5}] * 100_000),
    view("a window of 2^62", None, pairing_window=2**62),
    view("plan version 10^9", None, plan_version=10**9),
]
