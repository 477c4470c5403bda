"""What peers.py computes: rates without the start, times for k students, accuracies from what programs print."""

import importlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    """Import the benchmark, which is a script and imports others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("peers")


@pytest.fixture(scope="module")
def programs(peers: ModuleType) -> ModuleType:
    """Import its commands."""
    return importlib.import_module("_peer_programs")


def run_in(programs: ModuleType, folder: Path) -> object:
    """Make a run of two epochs."""
    return programs.Run("python", folder / "checkouts", folder / "images", folder / "teacher", folder, 2, 7)


def test_rate_leaves_the_start_out_and_students_share_one_precompute(peers: ModuleType) -> None:
    costs = {
        ("logitcache", 0, 1): peers.Cost(15.0, 0.0, 900.0, 0.5),
        ("logitcache", 0, 3): peers.Cost(25.0, 0.0, 950.0, 0.6),
        ("cache", 0, 3): peers.Cost(40.0, 0.0, 990.0),
        ("timm", 0, 1): peers.Cost(20.0, 0.0, 800.0, 0.5),
        ("timm", 0, 3): peers.Cost(60.0, 0.0, 800.0, 0.7),
    }
    ours, timm = (peers.row_of(name, costs, [0], 3, 100) for name in ("logitcache", "timm"))
    assert ours["images_per_second"]["mean"] == 2 * 100 / 10
    assert timm["images_per_second"]["mean"] == 2 * 100 / 40
    assert {count: total["mean"] for count, total in ours["seconds_of_students"].items()} == {
        **{"1": 65.0, "2": 90.0},
        **{"5": 165.0, "20": 540.0},
    }
    assert timm["seconds_of_students"]["20"]["mean"] == 1200.0
    assert ours["memory_mib"] == 990, "precompute counts"
    assert peers.wins([ours, timm]) == [
        "timm takes less memory",
        "timm has a higher mean top-1",
        "timm takes less time for 1 student",
    ]


def test_deviation_is_over_seeds(peers: ModuleType) -> None:
    costs = {
        ("keras", seed, epochs): peers.Cost(10.0 * epochs + seed, 0, 1, None) for seed in (0, 2) for epochs in (1, 2)
    }
    row = peers.row_of("keras", costs, [0, 2], 2, 50)
    assert row["images_per_second"] == {"mean": 5.0, "std": 0.0}
    assert row["seconds_of_students"]["1"] == {"mean": 21.0, "std": pytest.approx(np.std([20, 22], ddof=1))}
    assert row["top1"] is None


def test_accuracies_are_read_from_what_programs_print(programs: ModuleType) -> None:
    validations = [
        f"2026 INFO\t * Acc@1 {top1}\tAcc@5 99.0000\n" for top1 in ("40.0000", "52.5000", "90.0000", "55.0000")
    ]
    assert programs.PROGRAMS["torchdistill"].top1("".join(validations), 2) == 0.525
    batches = "Test: [0/1]  Loss: 2.0 (2.0)  Acc@1:  15.625 ( 15.625)  Acc@5: 53.1 ( 53.1)\n" * 2
    last = "Test: [1/1]  Loss: 2.0 (2.0)  Acc@1:   0.000 ( 61.500)  Acc@5: 44.4 ( 51.0)\n"
    assert programs.PROGRAMS["timm"].top1(batches + last, 2) == 0.615
    assert programs.PROGRAMS["keras"].top1('Epoch 2/2\n{"top1": 0.25}\n', 2) == 0.25
    assert programs.PROGRAMS["logitcache"].top1('epoch 1\n{\n  "top1": 0.5,\n  "top5": 0.75\n}\n', 2) == 0.5
    assert programs.PROGRAMS["lightly-train"].top1("anything", 2) is None


def test_configurations_agree_on_the_setting(programs: ModuleType, tmp_path: Path) -> None:
    run = run_in(programs, tmp_path)
    command = programs.PROGRAMS["torchdistill"].command(run)

    class Loader(yaml.SafeLoader):
        """Reads the tags of torchdistill as pairs of tag and mapping."""

    Loader.add_multi_constructor("!", lambda loader, tag, node: (tag, loader.construct_mapping(node, deep=True)))
    config = yaml.load(Path(command[command.index("--config") + 1]).read_text(), Loader)
    tag, images = config["datasets"]["train"]
    assert (tag, images["key"]) == ("import_call", "torchvision.datasets.ImageFolder")
    sampler = config["train"]["train_data_loader"]["sampler"]["class_or_func"]
    assert sampler == ("import_get", {"key": "torch.utils.data.RandomSampler"})
    kd = config["train"]["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]
    timm = programs.PROGRAMS["timm"].command(run)
    recipe = yaml.safe_load(Path(programs.PROGRAMS["logitcache"].command(run)[4]).read_text())
    labels, divergence = recipe["losses"]
    assert kd["temperature"] == divergence["temperature"] == float(timm[timm.index("--kd-temperature") + 1])
    assert kd["alpha"] == labels["weight"] == float(timm[timm.index("--task-loss-weight") + 1])
    assert recipe["optimizer"]["lr"] == config["train"]["optimizer"]["kwargs"]["lr"]
    assert config["train"]["num_epochs"] == recipe["epochs"] == 2


def test_a_command_is_accounted_for_as_the_system_does(peers: ModuleType, tmp_path: Path) -> None:
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 100
    code = f"held = bytearray({mebibytes} << 20); held[::4096] = b'1' * len(held[::4096]); print('done')"
    cost, output = peers.measured([sys.executable, "-c", code], tmp_path)
    assert mebibytes <= cost.memory <= mebibytes + 200
    assert 0 < cost.cpu < 60
    assert output == "done\n"
    with pytest.raises(peers.CommandError, match=r"exited with 3, .*log.txt: …what was wrong"):
        peers.measured([sys.executable, "-c", "print('what was wrong'); raise SystemExit(3)"], tmp_path)
    with pytest.raises(peers.CommandError, match="no more memory than this process"):
        peers.measured([sys.executable, "-c", "pass"], tmp_path)


def test_what_is_not_there_is_not_installed(peers: ModuleType, tmp_path: Path) -> None:
    assert peers.version_of(None, "keras") is None
    assert peers.version_of(sys.executable, "a-distribution-that-is-not-there") is None
    assert peers.version_of(sys.executable, "numpy") == np.__version__


def test_images_are_those_of_the_package(peers: ModuleType, tmp_path: Path) -> None:
    importlib.import_module("_peer_inputs").write_images(tmp_path, {"train": 20, "validation": 10})
    files = sorted((tmp_path / "train").rglob("*.png"))
    assert [len([*(tmp_path / "train" / str(label)).iterdir()]) for label in range(10)] == [2] * 10
    with np.load(ROOT / "data" / "fashion_mnist" / "train.npz") as stored:
        expected, label = stored["images"][int(files[0].stem)], stored["labels"][int(files[0].stem)]
    pixels = np.asarray(Image.open(files[0]))
    assert files[0].parent.name == str(label)
    assert pixels.shape == (32, 32, 3)
    assert (pixels[2:-2, 2:-2] == expected[..., None]).all()
