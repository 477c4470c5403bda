"""Tar members: what a tar archive holds, found in one pass from its first byte to its last.

Formats: POSIX ustar, pax (path and size of a member) and GNU (long names, sizes above 8 GiB); `tar.h` and the chapter
"pax" of POSIX.1-2017 describe them. Unlike other readers this one takes a header that is broken, an end that is missing
and bytes after the end for damage.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_SKIPPED = 1 << 20  # bytes passed over at a time
_REGULAR, _LINKS, _OTHERS = (b"0", b"\0", b"7"), (b"1", b"2"), (b"3", b"4", b"5", b"6")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", b"x", b"g"
_ABOUT_THE_NEXT = (_LONG_NAME, _LONG_LINK, _PAX, b"X", _PAX_OF_ALL)
_LONGEST_NAME = 1 << 20
_MOST_PADDING = 1 << 26
_LARGEST_MEMBER = 1 << 28  # bytes that are held in memory
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Readable(Protocol):
    """What is read from its start to its end; less than was asked for comes only at the end. Seeks go forwards."""

    def read(self, count: int, /) -> bytes: ...
    def seek(self, offset: int, whence: int, /) -> int: ...


class TarMember(NamedTuple):
    """A file in an archive: its name, the place of its first byte, and its bytes if they are wanted."""

    name: str
    start: int
    data: bytes


def members(file: Readable, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """Yield the files of an archive in order, with the bytes of those that are wanted.

    Raises ValueError naming what is broken, and at which offset.
    """
    tape, said = _Tape(file), dict[str, str]()
    while (header := tape.take(_BLOCK)) != _ZEROS:
        name, size, kind = _parsed(header, tape.place - _BLOCK)
        if kind in _ABOUT_THE_NEXT:
            said |= _fields_for_next(kind, tape.take(_bounded(size, tape.place)))
        else:
            name, size = said.get("path", name), _counted(int(said.get("size", size))) if kind in _REGULAR else 0
            said, start = {}, tape.place
            if kind in _REGULAR and not name.endswith("/"):
                yield TarMember(name, start, tape.take(_held(name, size)) if wanted(name) else tape.skip(size))
            else:
                _require_passable(name, kind, wanted)
                tape.skip(size)
        tape.skip(-size % _BLOCK)
    tape.require_end()


class _Tape:
    """A file read from its start to its end, and how far."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.place = 0

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            end = self.place + len(data)
            raise ValueError(
                f"it ends at byte {end} without the zeros that end an archive"
                if end == self.place
                else f"it ends at byte {end} in the middle of what begins at byte {self.place}"
            )
        self.place += count
        return data

    def skip(self, count: int) -> bytes:
        """Pass over bytes, which may be a hole of any size; a seek does not notice the end, so the last is read."""
        if count <= _SKIPPED:
            self.take(count)
            return b""
        start = self.place
        self._file.seek(count - 1, os.SEEK_CUR)
        self.place += count - 1
        if not self._file.read(1):
            raise ValueError(f"it ends before byte {self.place} in the middle of what begins at byte {start}")
        self.place += 1
        return b""

    def require_end(self) -> None:
        padding = 0
        while data := self._file.read(_SKIPPED):
            if data.strip(b"\0"):
                raise ValueError(f"bytes follow its end at byte {self.place}, as in archives that were joined")
            padding += len(data)
            if padding > _MOST_PADDING:
                raise ValueError(f"more than {_MOST_PADDING} zeros follow its end at byte {self.place}")


def _parsed(header: bytes, place: int) -> tuple[str, int, bytes]:
    """Return the name, the size and the type that a header states."""
    if not _is_header(header):
        raise ValueError(_why_no_header(header, place))
    name, prefix = _text(header[:100]), _text(header[345:500])
    posix = header[257:263] == b"ustar\0"  # GNU keeps something else there
    return f"{prefix}/{name}" if posix and prefix else name, _counted(_number(header[124:136])), header[156:157]


def _is_header(header: bytes) -> bool:
    """Whether the checksum is that of the block, its own field taken for spaces."""
    stated = header[148:156]
    try:
        return _number(stated) == sum(header) - sum(stated) + 8 * ord(" ")
    except ValueError:
        return False


def _why_no_header(header: bytes, place: int) -> str:
    if place:
        return f"byte {place} should begin a header, whose checksum is wrong"
    if header.startswith(_COMPRESSED):
        return "it is compressed, so that no member can be read by itself"
    return "it is no tar archive"


def _number(field: bytes) -> int:
    """Read an octal number, or one of GNU's that is binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _counted(size: int) -> int:
    if not 0 <= size < 1 << 62:
        raise ValueError(f"a header states a size of {size} bytes")
    return size


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(errors="surrogateescape")


def _bounded(size: int, place: int) -> int:
    if size > _LONGEST_NAME:
        raise ValueError(f"the header before byte {place} is followed by {size} bytes about one member")
    return size


def _held(name: str, size: int) -> int:
    if size > _LARGEST_MEMBER:
        raise ValueError(f"its member '{name}' has {size} bytes, more than the {_LARGEST_MEMBER} that are read at once")
    return size


def _fields_for_next(kind: bytes, text: bytes) -> dict[str, str]:
    """Return the fields that a header member sets for the next member."""
    if kind == _LONG_NAME:
        return {"path": _text(text)}
    if kind == _LONG_LINK:
        return {}
    records = dict(_records(text))
    if any(name.startswith("GNU.sparse") for name in records):
        raise ValueError("it holds a sparse file, whose bytes are not in one piece")
    if kind == _PAX_OF_ALL and records.keys() & {"path", "size"}:
        raise ValueError("a header for all members states a path or a size")
    return {name: records[name] for name in ("path", "size") if name in records}


def _records(text: bytes) -> Iterator[tuple[str, str]]:
    """Take apart records of the form "length name=value\\n"."""
    while text:
        length = text.split(b" ")[0]
        record = text[: int(length)] if length.isdigit() else b""
        name, equals, value = record[len(length) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n") or len(record) != int(length):
            raise ValueError(f"a pax header holds {text[:40]!r} where a record should begin")
        yield name.decode(errors="surrogateescape"), value[:-1].decode(errors="surrogateescape")
        text = text[len(record) :]


def _require_passable(name: str, kind: bytes, wanted: Callable[[str], bool]) -> None:
    """Raise ValueError for a member that cannot be left out."""
    if kind not in (*_REGULAR, *_LINKS, *_OTHERS):
        raise ValueError(f"its member '{name}' is of type {kind.decode(errors='replace')!r}, which is not read")
    if kind in _LINKS and wanted(name):
        raise ValueError(f"its member '{name}' is a link, which has no bytes of its own")
