"""Does anything that comes from outside run code, escape, or exhaust the machine?

    python benchmarks/hostile.py [--quick] [--json] [--only TEXT] [--verbose]

Each case of `hostile_cases/` spoils one thing of a small cache, a run folder, an object store or a server, signs it
again where it has digests, and runs every command that opens it. A command passes if it ends within SECONDS and
MEGABYTES above the same command on what is not spoilt (for servers: above an empty command and within the request
limits, which are set low here), with an exit code of its case, without a "bug", and if an audit hook of the interpreter
saw no code run, no connection to another host and no file opened outside of the case's own folder. `--quick` runs every
third case on the command that it is most about, the full run all cases on all commands that open a cache or a run; two
at a time. Exits 1 unless all pass.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from _harness import parser_of, print_json  # noqa: E402

SECONDS, MEGABYTES, KILL_AFTER = 2.0, 300, 20.0
"""Above the same command on sound input; and when a command counts as hanging."""

HANGS = 36_000
"""Seconds after which all of them together do, however slow the machine is."""

_READABLE = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/mounts", "/sys", "/dev/null", "/usr")
_READABLE += ("/dev/urandom", "/etc/ssl", "/etc/mime.types", "/etc/localtime", "/etc/hosts", "/etc/nsswitch.conf")
_READABLE += ("/etc/resolv.conf", "/etc/gai.conf", "/etc/host.conf", "/lib", sys.prefix, sys.base_prefix)
_READABLE += tuple(os.path.realpath(folder) for folder in sys.path if folder)
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen", "os.startfile", "pty.spawn")
_PLAIN_CLASSES = ("numpy", "collections", "torch._utils", "_codecs")


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what the audit hook saw; `code` is None if it was killed for hanging.

    `seconds` are without those for which it could have run, but others had the processors.
    """

    code: int | None
    seconds: float
    megabytes: float
    seen: Sequence[str]
    output: str


def guarded(arguments: Sequence[str], folder: Path, environment: Mapping[str, str], ports: frozenset[int]) -> Outcome:
    """Run one command in a fork of this process, which has imported all that it needs."""
    log, found = folder / "output.txt", folder / "audit.txt"
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        _run(arguments, folder, environment, ports, log, found)
    code: int | None = None
    usage = None
    while time.perf_counter() - began < KILL_AFTER:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    else:
        os.killpg(child, signal.SIGKILL)
        _, _, usage = os.wait4(child, 0)
    ended, delayed = time.perf_counter(), 0.0
    if (folder / "ended.txt").exists():
        ended, delayed = map(float, (folder / "ended.txt").read_text().split())
    seen = tuple(dict.fromkeys(found.read_text(errors="replace").splitlines())) if found.exists() else ()
    output = log.read_text(errors="replace") if log.exists() else ""
    return Outcome(code, ended - began - delayed, usage.ru_maxrss / 1024, seen, output)


def _run(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    ports: frozenset[int],
    log: Path,
    found: Path,
) -> None:
    """Run a command in this child and end it, whatever happens."""
    code = 99
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.update(environment)
        tempfile.tempdir = None
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        report = os.open(found, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        waits = os.open("/proc/self/schedstat", os.O_RDONLY)
        sys.addaudithook(_Hook(report, folder, ports))
        from logitcache.cli import main

        code = main(list(arguments))
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    finally:
        with contextlib.suppress(OSError):
            delayed = int(os.pread(waits, 100, 0).split()[1]) / 1e9
            (folder / "ended.txt").write_text(f"{time.perf_counter()} {delayed}")
        os._exit(code & 0xFF)


class _Hook:
    """Write down what no command may do: events are named in the interpreter's table of audit events."""

    def __init__(self, report: int, folder: Path, ports: frozenset[int]) -> None:
        self._report, self._inside, self._ports = report, os.path.realpath(folder), ports

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        line = None
        if event == "open":
            line = self._opened(*arguments)
        elif event == "socket.connect":
            line = self._connected(arguments[1])
        elif event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", b"127.0.0.1", None):
            line = f"looked up {arguments[0]}"
        elif event == "pickle.find_class" and not str(arguments[0]).startswith(_PLAIN_CLASSES):
            line = f"unpickled {arguments[0]}.{arguments[1]}"
        elif event in _RUNS and not (event == "ctypes.dlopen" and self._is_installed(arguments[0])):
            line = f"{event} {arguments[:2]!r}"
        if line:
            os.write(self._report, (line.replace("\n", "\\n") + "\n").encode(errors="replace"))

    @staticmethod
    def _is_installed(library: object) -> bool:
        """Whether a library is this process itself, one of an installed package, or that of a GPU's driver."""
        return library in (None, "libnvidia-ml.so.1") or str(library).startswith(_READABLE)

    def _opened(self, path: object, mode: object, flags: object) -> str | None:
        if isinstance(path, int) or path is None:
            return None
        text = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
        real = os.path.realpath(text.replace("\0", ""))
        if real == self._inside or real.startswith(self._inside + "/"):
            return None
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and real not in ("/dev/null",):
            return f"wrote {real}"
        inside = real.startswith((*_READABLE, str(REPOSITORY), f"/proc/{os.getpid()}/"))
        return None if inside else f"read {real}"

    def _connected(self, address: object) -> str | None:
        if isinstance(address, tuple) and address[0] == "127.0.0.1" and address[1] in self._ports:
            return None
        return f"connected to {address}"


def judge(outcome: Outcome, empty: Outcome, codes: frozenset[int], folder: Path, seconds: float) -> list[str]:
    """List what a command did that it must not; it may take `seconds` longer than on sound input."""
    wrong = list(outcome.seen)
    if outcome.code is None:
        wrong.append(f"did not end within {KILL_AFTER:.0f} s")
    elif outcome.code not in codes:
        wrong.append(f"exit code {outcome.code}, not {' or '.join(map(str, sorted(codes)))}")
    if "this is a bug" in outcome.output or "Traceback" in outcome.output:
        wrong.append("a bug or a traceback")
    if outcome.seconds - empty.seconds > seconds:
        wrong.append(f"{outcome.seconds - empty.seconds:.1f} s")
    if outcome.megabytes - empty.megabytes > MEGABYTES:
        wrong.append(f"{outcome.megabytes - empty.megabytes:.0f} MB")
    if any((ord(sign) < 32 and sign not in "\n\t\r") or sign in "\x7f\u202e\u2066" for sign in outcome.output):
        wrong.append("control characters in its output")
    wrong += [f"made {path.name}" for path in folder.rglob("PWNED*")]
    wrong += [f"made {path}" for path in folder.parent.glob("PWNED*")]
    return wrong


@contextlib.contextmanager
def fresh(sound: Path) -> Iterator[Path]:
    """Yield a copy of what is sound, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="logitcache-hostile-") as outer:
        folder = Path(outer, "case")
        shutil.copytree(sound, folder, symlinks=True)
        yield folder
        # A case may have taken rights away.
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)


def main() -> int:
    """Run every case and print what went wrong."""
    parser = parser_of(__doc__, "every third case, on one command")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose group or name contains TEXT")
    parser.add_argument("--verbose", action="store_true", help="print the output of commands that fail")
    options = parser.parse_args()

    import hostile_cases as table  # after the arguments: it imports all that commands need

    cases = [case for case in table.CASES if options.only in f"{case.group}/{case.name}"]
    cases = [case for number, case in enumerate(cases) if number % 3 == 0 or not options.quick]
    attempts = [(case, name) for case in cases for name in (case.commands[:1] if options.quick else case.every)]
    names = sorted({name for _, name in attempts})
    with tempfile.TemporaryDirectory(prefix="logitcache-sound-") as outer:
        sound = Path(outer, "sound")
        with table.making_sound(sound):
            table.import_libraries(names)
        found = table.by_two(names, lambda name: asdict(_sound(sound, table, name)), HANGS)
        empty = {name: Outcome(**one) for name, one in zip(names, found, strict=True)}
        if not options.json:
            print(f"sound: { {name: outcome.code for name, outcome in empty.items()} }", flush=True)

        def result(attempt: tuple[Any, str]) -> dict[str, Any]:
            case, name = attempt
            outcome, wrong = _attempt(sound, table, case, name, empty[name])
            if any(text.endswith(" s") for text in wrong):  # others use the machine too: slow is what is slow twice
                outcome, wrong = _attempt(sound, table, case, name, empty[name])
            if wrong and not options.json:
                print(f"{case.group}/{case.name} {name}: {'; '.join(wrong)}", flush=True)
                if options.verbose:
                    print("    " + outcome.output[-2000:].replace("\n", "\n    "), flush=True)
            return {
                "group": case.group,
                "case": case.name,
                "command": name,
                "code": outcome.code,
                "seconds": round(outcome.seconds - empty[name].seconds, 2),
                "megabytes": round(outcome.megabytes - empty[name].megabytes),
                "wrong": wrong,
            }

        results = table.by_two(attempts, result, HANGS)
    failures = sum(bool(one["wrong"]) for one in results)
    summary = {"cases": len(cases), "commands": len(results), "failures": failures, "goal": "0 failures"}
    if options.json:
        print_json(results, **summary)
    else:
        print(f"{len(cases)} hostile cases, {len(results)} commands: {failures} failures (goal: 0)")
    return int(failures > 0 or not cases)


def _attempt(sound: Path, table: Any, case: Any, name: str, empty: Outcome) -> tuple[Outcome, list[str]]:
    with fresh(sound) as folder, case.prepared(folder) as (environment, ports):
        base = {**table.ENVIRONMENT, **environment, "HOME": str(folder), "TMPDIR": str(folder)}
        outcome = guarded(table.COMMANDS[name](folder, case), folder, base, ports)
        return outcome, judge(outcome, empty, case.codes(name), folder, SECONDS + case.seconds)


def _sound(sound: Path, table: Any, name: str) -> Outcome:
    with fresh(sound) as folder:
        environment = {**table.ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder)}
        return guarded(table.COMMANDS[name](folder, None), folder, environment, frozenset())


if __name__ == "__main__":
    sys.exit(main())
