"""Caches in object storage: written, continued, grown, verified and mended while requests fail."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.mirrors_folder import FOLDER
from tests.cache.made import DENSE16, TOP2_PACKED, contents, recipe, teacher
from tests.front import FAULTS
from tests.objects import KEY_ID, SECRET, Bucket, bucket, connecting, website
from tests.stage_one import misbehaving, remotely
from tests.stage_one.apart import program

LINEAR = {"kind": "custom", "factory": "tests.cache.made:Linear"}
IMAGES = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 90, "num_classes": 16}}
TEACHERS = {"t": teacher(DENSE16, model=LINEAR)}
TWO = TEACHERS | {"u": teacher(TOP2_PACKED, model=LINEAR)}
SHARD = "t.logits/c.1.1.0"
QUICK = tuple(fault for fault in FAULTS if fault != "silence")
"""Faults that need no waiting."""


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


@pytest.fixture
def store(served: Bucket) -> Iterator[Bucket]:
    served.front.fail(0)
    served.front.seen.clear()
    yield served
    served.front.fail(0)


@pytest.fixture(autouse=True)
def _own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache on this machine: six shards."""
    path = tmp_path_factory.mktemp("whole") / "x.zarr"
    precompute(plan(str(path)))
    return contents(path)


def plan(cache: Any, **changes: Any) -> PrecomputeRecipe:
    """Return the recipe of a cache at a path or a URL."""
    return recipe(cache, **({"dataset": IMAGES, "teachers": TEACHERS, "shard_rows": 40} | changes))


def written(folder: Path, cache: str, **changes: Any) -> str:
    """Write a recipe; returns its path."""
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(plan(cache, **changes)))
    return str(path)


def puts(store: Bucket, part: str) -> list[str]:
    """List the objects that were written, each as often as it was."""
    return [seen.path.partition(".zarr/")[2] for seen in store.front.asked("PUT", part)]


@pytest.mark.parametrize(("fraction", "teachers"), [(0.05, TWO), (0.2, TEACHERS)])
def test_precompute_on_failing_storage_writes_the_same_objects(
    fraction: float, teachers: dict[str, Any], store: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"a{fraction}.zarr"
    precompute(plan(tmp_path / "x.zarr", teachers=teachers))
    store.front.fail(fraction, seed=4)
    assert main(["precompute", written(tmp_path, f"{store.url}/{name}", teachers=teachers)]) == 0
    assert store.contents(name) == contents(tmp_path / "x.zarr")
    failed = {seen.fault for seen in store.front.asked(failed=True)}
    assert failed == set(FAULTS) if fraction > 0.1 else len(failed) > 1
    assert "Traceback" not in capsys.readouterr().err


def test_records_come_after_their_shards_and_the_root_last(store: Bucket) -> None:
    precompute(plan(f"{store.url}/order.zarr"))
    order = puts(store, "/order.zarr")
    skeleton = order[: order.index("zarr.json") + 1]
    assert not [key for key in skeleton if "/c." in key and "commits" not in key]
    for record in (key for key in order if ".commits/c." in key):
        group, _, name = record.partition(".commits/")
        shards = [key for key in order if key.startswith(f"{group}.") and "commits" not in key and name[:5] in key]
        assert max(order.index(key) for key in shards or order[:1]) < order.index(record)


@pytest.mark.slow
def test_a_cache_grows_on_failing_storage_as_on_a_disk(store: Bucket, tmp_path: Path) -> None:
    more = {"views": {**plan("x").views.model_dump(mode="json"), "num_views": 3}}
    store.front.fail(0.1, *QUICK, seed=5)
    for cache in (str(tmp_path / "g.zarr"), f"{store.url}/g.zarr"):
        precompute(plan(cache))
        precompute(plan(cache, teachers=TWO, **more))
    assert store.contents("g.zarr") == contents(tmp_path / "g.zarr")
    assert store.front.asked(failed=True)


def test_another_machine_continues_what_one_began(store: Bucket, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Parts by two machines, which have no copy in common, at a time after one another."""
    for part in ("1/2", "2/2"):
        os.environ[FOLDER] = str(tmp_path / f"machine {part[0]}")  # restored by the fixture
        assert main(["precompute", written(tmp_path, f"{store.url}/parts.zarr"), "--part", part, "-q"]) == 0
    assert store.contents("parts.zarr") == whole
    records = Counter(key for key in puts(store, "/parts.zarr") if ".commits/c." in key)
    assert set(records.values()) == {1}


def test_a_finished_cache_is_left_as_it_is(store: Bucket, whole: dict[str, bytes]) -> None:
    url = store.fill("again.zarr", whole)
    assert precompute(plan(url)).shards_written == 0
    assert puts(store, "") == []


DAMAGES = {
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "truncated": lambda data: data[: len(data) // 2],
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_just_it_is_mended(
    damage: str, store: Bucket, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{damage}.zarr"
    url = store.fill(name, whole)
    change = DAMAGES[damage]
    if change is None:
        store.remove(f"{name}/{SHARD}")
    else:
        store.put(f"{name}/{SHARD}", change(whole[SHARD]))
    store.front.fail(0.05, seed=6)
    assert main(["verify", url, "-q"]) == 3
    assert f"{url}/{SHARD}" in capsys.readouterr().out
    assert main(["verify", url, "--repair", written(tmp_path, "other.zarr"), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert store.contents(name) == whole
    assert set(puts(store, f"/{name}/")) == {SHARD, "t.logits.errors/c.1.1.0.0", "t.logits.commits/c.1.1.0.0"}


def test_a_sound_cache_is_verified_byte_by_byte_while_requests_fail(
    store: Bucket, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = store.fill("sound.zarr", whole)
    monkeypatch.setenv(FOLDER, str(tmp_path / "none yet"))
    store.front.fail(0.1, seed=7)
    assert main(["verify", url, "-q"]) == 0
    read = {seen.path.partition(".zarr/")[2] for seen in store.front.asked("GET", "/sound.zarr/")}
    assert {key for key in whole if "/c." in key} <= read
    assert puts(store, "") == []


@pytest.mark.parametrize("command", ["precompute", "verify", "repair", "inspect"])
@pytest.mark.parametrize("fault", ["500", "silence"])
def test_storage_that_fails_for_good_ends_a_command(
    command: str,
    fault: str,
    store: Bucket,
    whole: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = store.fill(f"{command}.zarr", whole)
    yaml = written(tmp_path, url)
    arguments = {"precompute": [yaml], "verify": [url], "repair": [url, "--repair", yaml], "inspect": [url]}[command]
    store.front.fail(1, fault)
    with connecting(store.environment, READ_SECONDS=0.2, ATTEMPTS=3):
        assert main(["verify" if command == "repair" else command, *arguments]) == 3
    errors = capsys.readouterr().err
    assert f"Error: {url}" in errors
    assert "Fix: see that the storage answers" in errors


def test_storage_that_fails_for_good_in_the_middle_ends_a_run_which_continues(
    store: Bucket, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = written(tmp_path, f"{store.url}/middle.zarr")
    store.front.fail(1, "503", picked=lambda request: len(store.front.asked("PUT", ".commits/c.")) >= 5)
    assert main(["precompute", yaml]) == 3
    assert f"Error: {store.url}/middle.zarr/" in capsys.readouterr().err
    store.front.fail(0)
    assert main(["precompute", yaml]) == 0
    assert store.contents("middle.zarr") == whole
    assert set(Counter(key for key in puts(store, "/middle.zarr/") if ".commits/c." in key).values()) == {1}


def test_access_that_is_refused_ends_a_command_at_once(
    store: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.front.fail(1, "403")
    assert main(["precompute", written(tmp_path, f"{store.url}/refused.zarr")]) == 3
    assert f"Error: {store.url}/refused.zarr" in capsys.readouterr().err
    assert len(store.front.asked(failed=True)) < 5


def test_no_secret_is_left_anywhere(store: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the cache, of the copy and of the recipes, and all that is printed."""
    url = f"{store.url}/secret.zarr"
    yaml = written(tmp_path, url)
    for fraction, faults in ((0.1, ()), (1, ("403",)), (1, ("500",))):
        store.front.fail(fraction, *faults)
        for arguments in (["precompute", yaml, "--verbose"], ["verify", url, "--json"], ["inspect", url]):
            main(arguments)
    told = "".join(capsys.readouterr())
    everything = [told.encode(), *store.contents("secret.zarr").values(), *contents(tmp_path).values()]
    assert "Credential=" in told  # the front tells what it was sent
    assert not [data for data in everything if KEY_ID.encode() in data or SECRET.encode() in data]


def test_a_url_with_secrets_is_refused_before_it_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://AKIDX:open/sesame@bucket/x.zarr"
    yaml = written(tmp_path, "s3://bucket/x.zarr")
    for arguments in (["precompute", yaml, "--set", f"cache={url}"], ["verify", url], ["inspect", url], ["gc", url]):
        assert main(arguments) == 2
        assert "sesame" not in "".join(capsys.readouterr())
    assert sorted(os.listdir(tmp_path)) in (["recipe.yaml"], ["copies", "recipe.yaml"])
    assert not [name for name in map(str, tmp_path.rglob("*")) if "sesame" in name]


def test_a_cache_on_a_web_server_is_only_read(
    whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    for key, data in whole.items():
        (site / "x.zarr" / key).parent.mkdir(parents=True, exist_ok=True)
        (site / "x.zarr" / key).write_bytes(data)
    with website(site) as front:
        url = f"{front.url}/x.zarr"
        front.fail(0.05, seed=8)
        assert main(["verify", url, "-q"]) == 0
        capsys.readouterr()
        assert main(["inspect", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["complete"]
        front.fail(0)
        changed = written(tmp_path, url, teachers=TWO)
        for arguments in (["precompute", changed], ["precompute", written(tmp_path, f"{front.url}/new.zarr")]):
            assert main(arguments) in (2, 3)
            assert "web server" in capsys.readouterr().err
        (site / "x.zarr" / SHARD).write_bytes(b"")
        assert main(["verify", url, "-q"]) == 3
        assert f"{url}/{SHARD}" in capsys.readouterr().out
        front.fail(1, "500")
        assert main(["verify", url, "-q"]) == 3
        assert main(["inspect", url]) == 3
    assert {seen.method for seen in front.seen} <= {"GET", "HEAD"}


@pytest.fixture(scope="module")
def apart(served: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program found that kills runs, with a few requests of its own failing."""
    served.front.fail(0.05, *QUICK, seed=9)
    served.front.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(remotely.URL, f"{served.url}/apart")
        found: dict[str, Any] = program("remotely", tmp_path_factory.mktemp("apart"))
    return found | {"seen": list(served.front.seen)}


@pytest.mark.slow
def test_resume_after_kill_writes_identical_objects(served: Bucket, apart: dict[str, Any]) -> None:
    expected = served.contents("apart/whole.zarr")
    assert [one["killed"] for one in apart["kills"]] == [-9] * remotely.NUM_KILLS
    assert len({one["written"] for one in apart["kills"]}) > 2
    for number in range(remotely.NUM_KILLS):
        assert served.contents(f"apart/kill{number}.zarr") == expected


@pytest.mark.slow
def test_resume_after_kill_commits_no_shard_twice(apart: dict[str, Any]) -> None:
    records = [
        s.path for s in apart["seen"] if s.method == "PUT" and ".commits/c." in s.path and s.fault in ("", "cut")
    ]
    assert len(set(records)) == (1 + remotely.NUM_KILLS) * 2 * remotely.NUM_SHARDS
    assert len(records) - len(set(records)) <= len([s for s in apart["seen"] if s.fault == "cut"])


@pytest.mark.slow
def test_processes_of_a_machine_share_a_copy(apart: dict[str, Any]) -> None:
    shards = Counter(
        seen.path.partition(".zarr/")[2]
        for seen in apart["seen"]
        if seen.method == "GET" and "/whole.zarr/" in seen.path and "/c." in seen.path and not seen.fault
    )
    rows = {key: count for key, count in shards.items() if ".commits/" not in key and not key.endswith(".errors")}
    assert len(rows) >= 2 * remotely.NUM_SHARDS
    assert set(rows.values()) == {1}
    assert len(set(apart["read"])) == 1


@pytest.mark.slow
def test_storage_that_misbehaves_loses_nothing(tmp_path: Path) -> None:
    for name, found in misbehaving.main(tmp_path, 1, misbehaving.FEW).items():
        assert (name, found["wrong"]) == (name, 0)
        assert found["faults"] > 0
