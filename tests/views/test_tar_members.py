"""Members of tar archives: what the standard library finds, and no damage passed over."""

import bz2
import gzip
import io
import lzma
import random
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.views.datasets.archives.tar_members import TarMember, members
from tests.views.archives import tarred

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300).map(
    lambda text: f"a{text.strip('/')}.x"
)
FORMATS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
TWO = tarred([("a.png", b"x" * 700), ("b.cls", b"1")])


def found(archive: bytes) -> list[TarMember]:
    return list(members(io.BytesIO(archive), lambda name: True))


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=5), st.sampled_from(FORMATS[:2]))
def test_names_places_and_bytes_are_those_of_the_standard_library(files: list[tuple[str, bytes]], format: int) -> None:
    archive = tarred(files, format)
    with tarfile.open(fileobj=io.BytesIO(archive)) as theirs:
        expected = [(member.name, member.offset_data) for member in theirs]
    ours = found(archive)
    assert [(name, start) for name, start, _ in ours] == expected
    assert [data for *_, data in ours] == [data for _, data in files]
    assert all(archive[start : start + len(data)] == data for _, start, data in ours)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["a.png", "f" * 90 + "/" + "a" * 60 + ".png", "a" * 100])
def test_every_format_is_read(format: int, name: str) -> None:
    (one,) = found(tarred([(name, b"abc")], format))
    assert (one.name, one.data) == (name, b"abc")


def test_what_is_not_wanted_is_passed_over() -> None:
    files = [("a.bin", bytes(3 << 20)), ("b.png", b"xyz"), ("c.bin", b"c")]
    ours = members(io.BytesIO(tarred(files)), lambda name: name.endswith("png"))
    assert [data for *_, data in ours] == [b"", b"xyz", b""]


def test_a_size_that_is_written_in_binary_is_read() -> None:
    archive = bytearray(tarred([("a.png", b"abc")], tarfile.GNU_FORMAT))
    archive[124:136] = b"\x80" + (3).to_bytes(11, "big")
    archive[148:156] = b" " * 8
    archive[148:156] = f"{sum(archive[:512]):06o}\0 ".encode()
    assert found(bytes(archive))[0].data == b"abc"


def test_an_archive_that_is_cut_anywhere_is_refused() -> None:
    end = TWO.rindex(b"1") + 512  # then zeros follow: the end of an archive, and what fills its last record
    for length in (*range(0, end, 100), *range(0, end, 512)):
        with pytest.raises(ValueError, match=rf"ends at byte {length}"):
            found(TWO[:length])


def test_a_byte_that_is_wrong_in_any_header_is_refused() -> None:
    for start in (0, 512 + 1024):
        for place in (0, 99, 124, 130, 148, 156, 257, 400):
            damaged = bytearray(TWO)
            damaged[start + place] ^= 1
            with pytest.raises(ValueError, match="no tar archive" if start == 0 else "byte 1536 should begin a header"):
                found(bytes(damaged))


def test_archives_that_were_joined_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes follow its end"):
        found(TWO + TWO)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_is_refused(compress) -> None:
    with pytest.raises(ValueError, match="compressed"):
        found(compress(random.Random(0).randbytes(2000) + TWO))


def special(kind: bytes, name: str = "a.png", **pax: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.pax_headers = kind, "b.png", pax
    return member.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


def test_folders_and_devices_are_passed_over_and_links_are_not() -> None:
    for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        assert found(special(kind)) == []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with pytest.raises(ValueError, match=r"'a\.png' is a link"):
            found(special(kind))
        assert list(members(io.BytesIO(special(kind)), lambda name: False)) == []


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (special(b"S"), "of type 'S'"),
        (special(tarfile.REGTYPE, **{"GNU.sparse.major": "1"}), "sparse"),
        (special(tarfile.REGTYPE, size="many"), "many"),
        (tarred([("a.png", b"abc")]).replace(b"ustar\x00", b"ustar\x01"), "no tar archive"),
        (b"<html>" + bytes(600), "no tar archive"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(archive: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(archive)


@pytest.mark.parametrize("text", [b"8 path=a\n", b"path=a\n", b"99 path=a\n", b"0 \n", b"11 path=ab", b"8 patha\n"])
def test_a_pax_header_that_is_broken_is_refused(text: bytes) -> None:
    about = tarfile.TarInfo("about")
    about.type, about.size = b"x", len(text)
    with pytest.raises(ValueError, match=r"a pax header holds b"):
        found(about.tobuf(tarfile.USTAR_FORMAT) + text.ljust(512, b"\0") + TWO)
