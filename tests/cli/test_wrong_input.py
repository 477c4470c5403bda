"""What a new user gets wrong: each is one error with its exit code, the thing that is wrong, and the fix."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from logitcache.cli import main
from logitcache.runtime import console

RECIPE = "cache: c.zarr\nteachers: {t: {model: {kind: bundled}}}\ndataset: {kind: bundled, num_images: 20}\n"
STUDENT = "cache: c.zarr\nout: run\nepochs: 1\nmodel: {kind: small_cnn}\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds a recipe of each stage, an empty one, a text, a folder and a foreign Zarr store."""
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(RECIPE)
    Path("second.yaml").write_text(STUDENT)
    Path("empty.yaml").touch()
    Path("notes.txt").write_text("hello\n")
    Path("folder").mkdir()
    Path("foreign.zarr").mkdir()
    Path("foreign.zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    monkeypatch.setattr(console, "configure", lambda **options: None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["precompute", "absent.yaml"], 2, ["absent.yaml", "no such file", "name a YAML file"]),
        (["precompute", "frist.yaml"], 2, ["frist.yaml", "did you mean 'first.yaml'?"]),
        (["precompute", '"first.yaml"'], 2, ['"first.yaml"', "the quotes", "write first.yaml"]),
        (["precompute", "folder"], 2, ["folder: is a folder", "name a recipe"]),
        (["precompute", "empty.yaml"], 2, ["empty.yaml:1", "is empty", "write lines"]),
        (["precompute", "notes.txt"], 2, ["notes.txt:1", "hello", "write lines"]),
        (["precompute", "notes.txt/first.yaml"], 2, ["notes.txt/first.yaml", "name a file"]),
        (["precompute", "first.yaml", "more"], 2, ["more", "Fix: see `logitcache precompute --help`"]),
        (["precompute", "first.yaml", "--set", "cach=x"], 2, ["--set cach=x", "did you mean 'cache'?"]),
        (["precompute", "first.yaml", "--part", "3/2"], 2, ["'3/2'", "1/N to N/N", "Fix:"]),
        (["precompute", "first.yaml", "--set", "cache=notes.txt"], 3, ["notes.txt exists and is no cache", "Fix:"]),
        (["precompute", "first.yaml", "--set", "cache=notes.txt/c"], 3, ["notes.txt/c cannot be written", "Fix:"]),
        (["recipe", "check"], 2, ["RECIPE", "Fix: see `logitcache recipe check --help`"]),
        (["verfy"], 2, ["verfy", "Did you mean 'verify'?", "Fix: see `logitcache --help`"]),
        (["train-student", "second.yaml", "--verify", "lose"], 2, ["lose", "strict", "train-student --help"]),
        (["evaluate", "notes.txt"], 2, ["notes.txt is no run", "Fix:"]),
        (["evaluate", "absent"], 2, ["absent is no run: no such folder exists", "Fix:"]),
        *(
            ([command, path], 3, [path, words, "Fix: "])
            for command in ("inspect", "summary", "verify", "gc")
            for path, words in (
                ("absent.zarr", "does not exist"),
                ("folder", "is no cache"),
                ("notes.txt", "is no cache"),
                ("foreign.zarr", "not a logitcache cache"),
            )
        ),
    ],
)
def test_each_is_one_error_that_says_what_and_how_to_mend_it(
    arguments: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out, message = capsys.readouterr()
    assert out == ""
    assert message.count("Error: ") == 1
    assert all(word in message for word in words), message


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place in which no folder can be made")
@pytest.mark.parametrize("cache", ["/proc/c.zarr", "/proc/sub/c.zarr"])
def test_a_place_where_no_folder_can_be_made_is_an_error_and_no_endless_wait(
    cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["precompute", "first.yaml", "--set", f"cache={cache}"]) == 3
    assert f"{cache} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "make it readable"),
        (errno.EEXIST, "another path"),
        (errno.EROFS, "can be written"),
        (errno.EFBIG, "the limit of file sizes"),
        (errno.EMFILE, "the limit of open files"),
    ],
)
def test_what_the_file_system_says_comes_with_a_fix(
    number: int, fix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment() -> None:
        raise OSError(number, os.strerror(number), "some/place")

    monkeypatch.setattr("logitcache.report.environment.environment", environment)
    assert main(["env"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"Error: some/place: {os.strerror(number)}\n  Fix: ")
    assert fix in message


def test_a_bug_is_told_where_no_file_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment() -> None:
        raise RuntimeError("broken")

    def no_room(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("logitcache.report.environment.environment", environment)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", no_room)
    assert main(["env"]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.endswith("Error: this is a bug: RuntimeError: broken\n")
