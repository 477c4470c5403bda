"""Files of rendered views: WebDataset archives, TFRecords and NPZ. The same views give the same bytes.

Each view has its key, `VIEW/IMAGE`, the id of its image, and the CRC-32 of its pixels in the order [C, H, W].
"""

import io
import json
import math
import struct
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from logitcache.views.keys import ViewKey

FileForm = Literal["webdataset", "tfrecord", "npz"]
PixelForm = Literal["png", "raw"]
PIXEL_FORMS: tuple[PixelForm, ...] = get_args(PixelForm)
ENDINGS: Mapping[FileForm, str] = {"webdataset": "tar", "tfrecord": "tfrecord", "npz": "npz"}

_TAR_BLOCK, _TAR_RECORD = 512, 10240
_MASK = 0xA282EAD8


class RenderedViews(NamedTuple):
    """Pixels uint8 [n, C, H, W] of views, their keys, the ids of their images and the CRC-32 of their pixels [n]."""

    pixels: NDArray[np.uint8]
    keys: Sequence[ViewKey]
    ids: Sequence[str]
    crc32: NDArray[np.uint32]

    @property
    def names(self) -> list[str]:
        """The keys as text."""
        return [f"{view}/{image}" for view, image in self.keys]


def encode_views(views: RenderedViews, form: FileForm, pixels: PixelForm) -> bytes:
    """Return the bytes of a file of views."""
    return _WRITERS[form](views, pixels)


def image_bytes(pixels: NDArray[np.uint8], form: PixelForm) -> bytes:
    """Return uint8 [C, H, W] as PNG, or as it is."""
    if form == "raw":
        return np.ascontiguousarray(pixels).tobytes()
    stream = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)).save(stream, "PNG")
    return stream.getvalue()


def _webdataset(views: RenderedViews, form: PixelForm) -> bytes:
    """Return an archive in which `VIEW/IMAGE.png` (or `.raw`) lies beside `VIEW/IMAGE.json`."""
    return tar_bytes(
        (f"{name}.{ending}", content)
        for name, pixels, facts in zip(views.names, views.pixels, _facts(views), strict=True)
        for ending, content in ((form, image_bytes(pixels, form)), ("json", json.dumps(facts).encode()))
    )


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Return an archive of members, each a name and its bytes; dates and owners are those of tarfile's defaults."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _facts(views: RenderedViews) -> list[dict[str, object]]:
    shape = list(views.pixels.shape[1:])
    return [
        {"key": name, "id": image, "crc32": crc, "shape": shape}
        for name, image, crc in zip(views.names, views.ids, views.crc32.tolist(), strict=True)
    ]


def _npz(views: RenderedViews, form: PixelForm) -> bytes:
    """Return arrays key, id, crc32 and pixels, not compressed."""
    stream = io.BytesIO()
    np.savez(
        stream, key=np.array(views.names), id=np.array(views.ids), crc32=views.crc32, pixels=views.pixels
    )  # numpy writes a fixed date
    return stream.getvalue()


def _tfrecord(views: RenderedViews, form: PixelForm) -> bytes:
    """Return records of tf.train.Example: key, id and image as bytes, crc32 and shape as int64.

    A record is its length, the masked CRC-32C of that, its bytes, and the masked CRC-32C of these, as
    tensorflow/core/lib/io/record_writer.h describes.
    """
    records = []
    for pixels, facts in zip(views.pixels, _facts(views), strict=True):
        features = {
            "key": _bytes_feature(str(facts["key"]).encode()),
            "id": _bytes_feature(str(facts["id"]).encode(errors="surrogateescape")),
            "image": _bytes_feature(image_bytes(pixels, form)),
            "crc32": _int_feature([facts["crc32"]]),  # type: ignore[list-item]
            "shape": _int_feature(list(pixels.shape)),
        }
        # map<string, Feature>: each entry has the name as field 1 and the feature as field 2.
        entries = [_field(1, _field(1, name.encode()) + _field(2, one)) for name, one in features.items()]
        example = _field(1, b"".join(entries))
        length = struct.pack("<Q", len(example))
        records += [length, _masked(length), example, _masked(example)]
    return b"".join(records)


def _field(number: int, content: bytes) -> bytes:
    """Return a field of protobuf whose value has a length."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _bytes_feature(value: bytes) -> bytes:
    return _field(1, _field(1, value))


def _int_feature(values: Sequence[int]) -> bytes:
    return _field(3, _field(1, b"".join(map(_varint, values))))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _masked(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


_WRITERS: Mapping[FileForm, Callable[[RenderedViews, PixelForm], bytes]] = {
    "webdataset": _webdataset,
    "tfrecord": _tfrecord,
    "npz": _npz,
}


def image_sizes(pixels: NDArray[np.uint8], form: PixelForm) -> list[int]:
    """Return the bytes that each of some images [n, C, H, W] takes in a file."""
    return [len(image_bytes(one, form)) for one in pixels]


def predicted_bytes(
    sizes: Sequence[int], counts: Sequence[int], ids: Sequence[str], num_views: int, form: FileForm
) -> int:
    """Estimate the bytes of files of so many views each, from the bytes that the images of some views take."""
    pixels, key = float(np.mean(sizes)), len(f"{num_views - 1}/{len(ids) - 1}")
    if form == "webdataset":  # ids fit into a block, and there may be millions
        padded = float(np.mean([-(-size // _TAR_BLOCK) for size in sizes]) + 3) * _TAR_BLOCK
        return sum(math.ceil((count * padded + 2 * _TAR_BLOCK) / _TAR_RECORD) * _TAR_RECORD for count in counts)
    lengths = np.fromiter((len(name.encode(errors="surrogateescape")) for name in ids), np.int64, len(ids))
    if form == "npz":  # texts are four bytes a character, as wide as the longest
        return sum(count * (round(pixels) + 4 + 4 * int(lengths.max()) + 4 * key) + 1000 for count in counts)
    return sum(count * round(pixels + float(lengths.mean()) + key + 90) for count in counts)
