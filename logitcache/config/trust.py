"""Trust: manifests that a user vouches for may name paths, URLs and options beyond the allow-list.

`risks()` of a data set or a model lists what it would open or build beyond the allow-list of manifests. An entry of
the user's own recipe needs no grant. An entry of a file is opened if it has no risks, or if the digest of the file is
granted: by `trust:` in the recipe, by --trust, by the environment variable, or because this user wrote that file.
"""

import contextlib
import os
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from logitcache.errors import RefusedError
from logitcache.store.files import user_cache_directory

VARIABLE = "LOGITCACHE_TRUST"
"""Names the environment variable: digests, separated by commas."""

_DIGEST = re.compile("[0-9a-f]{64}")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _listed(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _digests(value: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [one for one in value if not _DIGEST.fullmatch(one)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no digest of 64 hexadecimal digits, as `logitcache inspect` prints one")
    return value


_DIGESTS: dict[str, Any] = {"type": "array", "items": {"type": "string", "pattern": f"^{_DIGEST.pattern}$"}}

Trust = Annotated[
    tuple[str, ...],
    BeforeValidator(_listed),
    AfterValidator(_digests),
    WithJsonSchema({"anyOf": [_DIGESTS, _DIGESTS["items"]]}),
]
"""Digests of manifests that the user vouches for; one digest alone is a list of one."""


def require_grant(risks: Sequence[str], digest: str, trust: Collection[str], what: str, instead: str = "") -> None:
    """Raise RefusedError if `what`, from a file of that digest, has risks and no grant; `instead` is another fix."""
    if risks and not is_granted(digest, trust):
        raise RefusedError(
            f"{what} names {', '.join(risks)}, which is opened only if you vouch for it: you did not name it, and this "
            f"user did not write that file.\n  Fix: if you know where it comes from, add to your recipe:\n"
            f"    trust: {digest}\n  or to the command: --trust {digest}\n  or set {VARIABLE}={digest}"
            + (f"\n  Or {instead}" if instead else "")
        )


def is_granted(digest: str, trust: Collection[str] = ()) -> bool:
    """Return whether the user vouches for a manifest, or wrote it."""
    stated = os.environ.get(VARIABLE, "").replace(",", " ").split()
    folder = _folder()
    is_remembered = folder is not None and _is_own(folder, stat.S_IFDIR) and _is_own(folder / digest, stat.S_IFREG)
    return digest in (*trust, *stated) or is_remembered


def remember(digest: str) -> None:
    """Record that this user wrote a manifest, if there is a safe cache directory."""
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(folder, stat.S_IFDIR):
                os.close(os.open(folder / digest, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))


def inherit(before: str, after: str) -> None:
    """Grant the manifest of a cache that has grown, if the one before was granted."""
    if before != after and is_granted(before):
        remember(after)


def _folder() -> Path | None:
    directory = user_cache_directory()
    return directory / "written" if directory else None


def _is_own(path: Path, kind: int) -> bool:
    """Return whether a file or folder is the user's own, and nobody else may write to it. Links are not followed."""
    try:
        status = path.lstat()
    except OSError:
        return False
    own = stat.S_IFMT(status.st_mode) == kind and status.st_uid == os.geteuid()
    return own and not status.st_mode & _WRITABLE_BY_OTHERS
