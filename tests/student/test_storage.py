"""Training from caches elsewhere: the same losses as from one on this machine, while requests fail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe
from logitcache.store.mirrors_folder import FOLDER, SIZE
from logitcache.student.training import train
from tests.cache.made import contents
from tests.front import FAULTS
from tests.objects import KEY_ID, SECRET, Bucket, bucket, connecting, website
from tests.student.small import TEST_IMAGES, fill, metrics, student, weights

HOT = {"kind": "dense", "dtype": "float32"}
PACKED = {"kind": "top_k", "k": 3, "storage": "packed"}
MANY = {"shard_rows": 64}
RECORDED = {"row_checksums": True, "record_parameters": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "hot": {"logits": HOT},
    "packed": {"logits": PACKED, **MANY},
    "recorded": {"logits": PACKED, **RECORDED, **MANY},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "hot": {},
    "packed": {"views_per_image": 2, "epochs": 4},
    "recorded": {"replay": "recorded", "verify": "strict", "num_workers": 1, "start_method": "fork"},
}

# Python 3.12 warns of every fork of a process with threads; loader workers use none of their parent's.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket with a cache of each variant, three views each."""
    with bucket() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("writer")))
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


def both(variant: str, served: Bucket, local: Path) -> tuple[Path, str]:
    """Return a cache here and the same elsewhere; made once."""
    path, url = local / f"{variant}.zarr", f"{served.url}/{variant}.zarr"
    if not path.exists():
        fill(path, **VARIANTS[variant])
        served.fill(f"{variant}.zarr", contents(path))
    return path, url


@pytest.fixture(autouse=True)
def _own_copy(served: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    served.front.fail(0)
    served.front.seen.clear()
    yield
    served.front.fail(0)


def trained(out: Path, cache: Any, **changes: Any) -> tuple[bytes, list[dict[str, Any]]]:
    """Train three epochs, the last of which meets the first view again; returns the weights and the losses."""
    train(student(out, cache, **({"epochs": 3} | changes)))
    return weights(out), metrics(out)


def shard_reads(served: Bucket) -> list[str]:
    return [s.path.partition(".zarr/")[2] for s in served.front.asked("GET", "/c.") if ".commits/" not in s.path]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_a_local_cache_while_requests_fail(
    variant: str, served: Bucket, local: Path, tmp_path: Path
) -> None:
    path, url = both(variant, served, local)
    served.front.fail(0.1, seed=3)
    assert trained(tmp_path / "far", url, **STUDENTS[variant]) == trained(tmp_path / "near", path, **STUDENTS[variant])
    assert {seen.fault for seen in served.front.asked(failed=True)} & set(FAULTS)
    reads = shard_reads(served)
    assert reads
    assert len(reads) == len(set(reads))


def test_a_second_run_reads_no_shard_again(served: Bucket, local: Path, tmp_path: Path) -> None:
    _, url = both("hot", served, local)
    first = trained(tmp_path / "first", url)
    assert shard_reads(served)
    served.front.seen.clear()
    assert trained(tmp_path / "second", url) == first
    assert shard_reads(served) == []


def test_a_run_whose_cache_is_larger_than_the_copy_reads_views_again(
    served: Bucket, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two views of 8,000 bytes have room, of three."""
    path, url = both("hot", served, local)
    view = sum(file.stat().st_size for file in path.glob("*.logits/c.0.*"))
    monkeypatch.setenv(SIZE, str(2 * view))
    wide = {"epochs": 5, "num_views": 2}
    assert trained(tmp_path / "far", url, **wide) == trained(tmp_path / "near", path, **wide)


def test_a_copy_that_has_no_room_for_a_run_is_told(
    served: Bucket, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = both("hot", served, local)
    monkeypatch.setenv(SIZE, "5000")
    assert main(["train-student", recipe_file(tmp_path, url)]) == 3
    assert f"Fix: {SIZE}=" in capsys.readouterr().err


def test_a_copy_that_was_changed_on_the_disk_is_brought_again_or_told(
    served: Bucket, local: Path, tmp_path: Path
) -> None:
    _, url = both("hot", served, local)
    first = trained(tmp_path / "first", url)
    for file in (tmp_path / "copies").rglob("*.logits/c.*"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x99")
    assert trained(tmp_path / "second", url) == first


def test_a_damaged_object_is_never_trained_on(
    served: Bucket, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, url = both("hot", served, local)
    shard = next(file.relative_to(path) for file in sorted(path.glob("*.logits/c.1.*")))
    data = (path / shard).read_bytes()
    try:
        for number, damaged in enumerate((data[:-1] + bytes([data[-1] ^ 1]), data[:-4096], b"")):
            served.put(f"hot.zarr/{shard}", damaged)
            yaml = recipe_file(tmp_path, url)
            assert main(["train-student", yaml, "--set", f"out={tmp_path / str(number)}"]) == 3
            errors = capsys.readouterr().err
            assert f"{url}/{shard}" in errors
            assert f"Fix: open it again; `logitcache verify {url} --repair RECIPE` writes just" in errors
    finally:
        served.put(f"hot.zarr/{shard}", data)


def test_a_cache_is_trained_from_over_http(served: Bucket, local: Path, tmp_path: Path) -> None:
    path, _ = both("packed", served, local)
    with website(local) as front:
        front.fail(0.1, seed=4)
        far = trained(tmp_path / "far", f"{front.url}/packed.zarr")
        assert front.asked(failed=True)
    assert far == trained(tmp_path / "near", path)


def test_validation_reads_its_cache_from_elsewhere_too(served: Bucket, local: Path, tmp_path: Path) -> None:
    path, url = both("hot", served, local)
    fill(local / "validation.zarr", images=TEST_IMAGES, views={})
    far = {"validation": {"cache": served.fill("validation.zarr", contents(local / "validation.zarr"))}}
    near = {"validation": {"cache": str(local / "validation.zarr")}}
    assert trained(tmp_path / "far", url, **far) == trained(tmp_path / "near", path, **near)


def recipe_file(folder: Path, url: Any, **changes: Any) -> str:
    file = folder / "student.yaml"
    file.write_text(dump_recipe(student(folder / "run", url, **changes)))
    return str(file)


@pytest.mark.parametrize("fault", ["500", "silence"])
def test_storage_that_fails_for_good_ends_training(
    fault: str, served: Bucket, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = both("hot", served, local)
    served.front.fail(1, fault)
    with connecting(served.environment, READ_SECONDS=0.2, ATTEMPTS=3):
        assert main(["train-student", recipe_file(tmp_path, url)]) == 3
    errors = capsys.readouterr().err
    assert f"Error: {url}/" in errors
    assert "Fix: see that the storage answers" in errors
    assert "Traceback" not in errors


def test_storage_that_fails_in_the_middle_ends_training_which_continues(
    served: Bucket, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, url = both("hot", served, local)
    yaml = recipe_file(tmp_path, url)
    served.front.fail(1, "503", picked=lambda request: "/c.1." in request.target and ".commits" not in request.target)
    assert main(["train-student", yaml]) == 3
    assert "/c.1." in capsys.readouterr().err
    served.front.fail(0)
    assert main(["train-student", yaml, "--resume"]) == 0
    trained(tmp_path / "near", path, epochs=2)
    assert weights(tmp_path / "run") == weights(tmp_path / "near")


def test_no_secret_is_left_in_a_run(
    served: Bucket, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = both("hot", served, local)
    served.front.fail(0.1, seed=5)
    assert main(["train-student", recipe_file(tmp_path, url), "--verbose"]) == 0
    served.front.fail(1, "403")
    assert main(["train-student", recipe_file(tmp_path, url), "--verbose", "--set", f"out={tmp_path / 'other'}"]) == 3
    told = "".join(capsys.readouterr()).encode()
    for data in (told, *contents(tmp_path).values()):
        assert KEY_ID.encode() not in data
        assert SECRET.encode() not in data


def test_results_are_written_to_folders(
    served: Bucket, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = both("hot", served, local)
    assert main(["train-student", recipe_file(tmp_path, url), "--set", f"out={served.url}/run"]) == 2
    assert f"{served.url}/run is a URL" in capsys.readouterr().err
