"""No character of a cache, a file name or an error reaches a terminal as anything but text."""

import ast
import io
import json
import re
import shutil
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import logitcache
from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import CacheError
from logitcache.runtime import console
from tests.cache.made import forge
from tests.stage_one.derived import derivation, source
from tests.student.small import student

CONTROLS = [*map(chr, (*range(9), *range(11, 32), *range(127, 160)))]
BIDIRECTIONAL = [*map(chr, (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))]
OTHERS = ["\u200b", "\u2028", "\u2029", "\ufeff", "\U000e0041", "\ud800", "\udc80", "\udfff"]
HOSTILE = [*CONTROLS, *BIDIRECTIONAL, *OTHERS]
SEQUENCES = ["\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "[red]red[/]", "[link=http://a.b]a[/link]", ":smile:"]
EVIL = "a\x1b[31m\x07\x9b1m\u202eb\u2066c[red]d[/red][link=http://a.b]e[/link]\r\x7ff"
TEXT_NAME = EVIL.replace("/", "|")
NAME = TEXT_NAME + "\udcff"
"""The same as a file may be called, the second not in UTF-8."""

NEVER = set(HOSTILE)


def shown(text: str) -> None:
    """Require that a terminal would show all of a text and obey none."""
    assert not NEVER & set(text), ascii(text)


@given(st.text(st.characters(codec=None) | st.sampled_from(HOSTILE)))
def test_visible_text_has_no_invisible_characters_and_shows_all_others_as_they_are(text: str) -> None:
    found = console.visible(text)
    kinds = {unicodedata.category(character) for character in found if character not in "\n\t"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert console.visible(found) == found
    plain = [c for c in text if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert (found == text) == (plain == list(text))


@pytest.mark.parametrize("text", ["plain", "two\n\tlines", "é ü 日本 ½ € 👍 \u00a0", *SEQUENCES[3:]])
def test_ordinary_text_is_as_it_is(text: str) -> None:
    assert console.visible(text) == text


@pytest.mark.parametrize("hostile", [*HOSTILE, *SEQUENCES], ids=ascii)
def test_answers_errors_warnings_and_tracebacks_show_what_they_hold(
    hostile: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"before{hostile}after"
    monkeypatch.setattr("logitcache.report.environment.environment", lambda: {text: text, "rows": [{"name": text}]})
    assert main(["env"]) == 0
    shown(out := capsys.readouterr().out)
    assert out.count("before") == 3
    assert out.count("after") == 3
    assert main(["env", "--json"]) == 0
    shown(out := capsys.readouterr().out)
    assert json.loads(out) == {text: text, "rows": [{"name": text}]}

    lines: list[str] = []

    def failing() -> None:
        console.logger.info(text)
        console.logger.debug(text)
        lines.append(warnings.formatwarning(text, UserWarning, "file", 1))
        raise CacheError(text)

    monkeypatch.setattr("logitcache.report.environment.environment", failing)
    assert main(["env", "-v", "--debug"]) == 3
    shown(err := capsys.readouterr().err)
    assert err.count("before") >= 4
    [line] = lines
    shown(line)
    assert line.startswith("Warning: before")
    assert main(["env", "--json"]) == 3
    out, err = capsys.readouterr()
    shown(out + err)
    assert json.loads(out)["error"]["message"] == text


def test_a_bug_s_traceback_file_shows_what_it_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def failing() -> None:
        raise RuntimeError(f"{EVIL}\ud800")

    monkeypatch.setattr("logitcache.report.environment.environment", failing)
    assert main(["env"]) == 1
    shown(capsys.readouterr().err)
    [file] = tmp_path.iterdir()
    shown(file.read_text())


def test_a_stream_of_a_poor_encoding_takes_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    console.write("é 日\n")
    stream.seek(0)
    assert stream.read() == "\\xe9 \\u65e5\n"


def test_bars_show_their_descriptions_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    console.configure()
    file = io.StringIO()
    monkeypatch.setattr(console._output, "console", Console(file=file, force_terminal=True, width=100))
    list(console.track(range(2), "[link=http://a.b]x\x07\u202e[/link]", 2, "[red]units[/red]"))
    written = file.getvalue()
    assert r"[link=http://a.b]x\x07\u202e[/link]" in written
    assert "[red]units[/red]" in written
    assert not {"\x07", "\u202e"} & set(written)


PRINTING = re.compile(r"(print|(typer\.|click\.)?s?echo|traceback\.print_.*|(.*\.)?(stdout|stderr)\.write)")


def test_all_printing_is_in_one_place() -> None:
    package, found = Path(logitcache.__file__).parent, []
    for file in package.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        found += [file.name for call in calls if PRINTING.fullmatch(ast.unparse(call.func))]
    assert found == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache whose texts are hostile, all that its manifest can hold."""
    path = source(tmp_path_factory.mktemp("hostile") / "c.zarr", count=60)

    def change(manifest: dict[str, Any]) -> None:
        manifest["versions"] = {EVIL: EVIL, "torch": EVIL}
        manifest["dataset"] = {"kind": "image_folder", "root": TEXT_NAME}
        for entry in manifest["teachers"].values():
            entry["model"] = {"kind": EVIL, EVIL: [EVIL], "root": EVIL}

    forge(path, change)
    return path


def damaged(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    (to / "a.logits" / "c.0.0.0").write_bytes(b"\x1b[31m")
    (to / "a.logits.commits" / "c.0.0.0.0").write_bytes(b"\x1b[31m\x07")
    (to / f"x{NAME}.logitcache-tmp").write_bytes(b"")
    (to / f"{NAME}.weight").mkdir()
    return to


def test_every_command_over_a_hostile_cache_prints_text(
    hostile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = damaged(hostile, tmp_path / f"broken{TEXT_NAME}")
    derive, train = tmp_path / f"derive{NAME}.yaml", tmp_path / f"train{NAME}.yaml"
    derive.write_text(dump_recipe(derivation(broken, tmp_path / "out", {"a": {"keep": "all"}})))
    train.write_text(dump_recipe(student(tmp_path / "run", broken)))
    none = str(tmp_path / f"none{NAME}")
    places = [str(hostile), str(broken), none]
    commands = [[name, place] for name in ("inspect", "summary", "verify") for place in places]
    commands += [["gc", place, "--dry-run"] for place in places]
    commands += [["derive", str(derive)], ["train-student", str(train)], ["evaluate", none], ["evaluate", str(broken)]]
    commands += [["recipe", "check", str(derive), str(train), none]]
    commands += [[name, none] for name in ("plan", "precompute", "train-teacher", EVIL)]
    commands += [["verify", str(hostile), "--set", f"dataset.root={EVIL}"], ["env", f"--{EVIL}"]]
    commands += [["precompute", str(derive), "--scheduler", f"tcp://{EVIL}:1"]]
    codes = set()
    for command in commands:
        for option in ([], ["--json"], ["--debug", "-v"]):
            codes.add(main([*command, *option]))
            out, err = capfd.readouterr()
            shown(out + err)
            if option == ["--json"]:
                json.loads(out)
    assert codes == {0, 2, 3}
