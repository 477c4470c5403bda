"""Create a cache: its skeleton appears whole or not at all, and has one writer."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from logitcache.cache.layout import require_possible
from logitcache.cache.manifest import Manifest, parse_manifest
from logitcache.cache.skeleton import ROOT, Samples, metadata_files
from logitcache.errors import CacheError

_held: set[int] = set()


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the cache at `path`."""
    file = path / ROOT
    try:
        if not file.is_file():
            found = f"is no cache (it has no {ROOT})" if path.exists() else "does not exist"
            raise CacheError(f"{path} {found}. Fix: check the path, or make it with `logitcache precompute`")
        stored = json.loads(file.read_bytes())
        attributes = stored["attributes"] if stored["node_type"] == "group" else {}
    except OSError as error:
        raise CacheError(f"{file} cannot be read: {error.strerror}. Fix: make it readable") from error
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{file} is damaged: {type(error).__name__}: {error}. "
            f"Fix: restore it, or remove {path} and precompute again"
        ) from error
    manifest = parse_manifest(attributes, str(path))
    require_possible(manifest, str(path))
    return manifest


@contextmanager
def writer_lock(path: Path) -> Iterator[Path]:
    """Hold the only right to write at `path`; yields where to write: `path`, or a directory beside it when it is new.

    The lock is on the directory itself, goes with it when it is renamed, and ends with the process. A new directory
    that was not renamed is removed. Raises CacheError where another process writes, or where no cache can be.
    """
    with _explained(path):
        lock, target = _lock(path)
    _held.add(lock)
    try:
        yield target
    finally:
        if target != path:
            shutil.rmtree(target, ignore_errors=True)
        _held.discard(lock)
        os.close(lock)


def _lock(path: Path) -> tuple[int, Path]:
    while True:
        target = _target(path)
        target.mkdir(parents=True, exist_ok=True)
        # Another run may rename or remove the directory before it is locked here: then look again.
        with suppress(FileNotFoundError):
            lock = os.open(target, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _target(path) == target and os.path.samestat(os.fstat(lock), os.stat(target)):
                    return lock, target
            except BlockingIOError as error:
                os.close(lock)
                raise CacheError(
                    f"{path} is being written by another precompute. Fix: wait for it, or stop it"
                ) from error
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
            if target != path:
                # It came after the rename, and is nobody's.
                with suppress(OSError):
                    target.rmdir()


def _target(path: Path) -> Path:
    if (path / ROOT).exists():
        return path
    if os.path.lexists(path) and (not path.is_dir() or path.is_symlink() or any(path.iterdir())):
        raise CacheError(f"{path} exists and is no cache: nothing is overwritten. Fix: name another path, or remove it")
    return path.with_name(path.name + ".creating")


def _forget_locks() -> None:
    """Close a parent's locks in a forked worker, which would hold them on when the parent is killed."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error.strerror}. Fix: mend the cause, or name another path"
        ) from error


def create_skeleton(target: Path, path: Path, manifest: Manifest, samples: Samples) -> None:
    """Write metadata and what is known of the images into `target`, then rename it to `path`."""
    with _explained(path):
        for leftover in target.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for key, data in (metadata_files(manifest) | samples.files()).items():
            (target / key).parent.mkdir(parents=True, exist_ok=True)
            (target / key).write_bytes(data)
        _sync_tree(target)
        target.replace(path)
        _sync(path.parent)


def _sync_tree(root: Path) -> None:
    """Flush every file and directory below `root` to the disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
