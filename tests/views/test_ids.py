"""Names of images: what a list of strings would hold, in few bytes."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.views.datasets.images.ids import NumberedIds, PackedIds, PathsBelow, narrowed

# As file systems give them: any bytes, those that are no UTF-8 as surrogates.
names = st.lists(st.binary(max_size=12).map(lambda name: name.decode(errors="surrogateescape")), max_size=20)
slices = st.slices(24)


@given(names=names, places=slices)
def test_packed_names_are_a_list_of_strings(names, places):
    packed = PackedIds(iter(names))
    assert (list(packed), len(packed)) == (names, len(names))
    assert packed[places] == names[places]
    assert [packed[place] for place in range(-len(names), len(names))] == names * 2
    assert list(pickle.loads(pickle.dumps(packed))) == names
    with pytest.raises(IndexError, match=f"image {len(names)} of {len(names)}"):
        packed[len(names)]


@given(parts=st.lists(names, max_size=6))
def test_joined_names_are_those_of_all_parts(parts):
    joined = PackedIds.joined([PackedIds(part) for part in parts])
    assert list(joined) == list(itertools.chain.from_iterable(parts))


def test_joined_names_may_need_wider_places_than_each_part():
    part = PackedIds(["a" * 70_000, "b"])
    joined = PackedIds.joined([part] * 3)
    assert [len(name) for name in joined] == [70_000, 1] * 3
    assert joined[5] == "b"


def test_a_name_takes_few_bytes_besides_its_own():
    found = PackedIds(f"n{number // 1300:08d}/n{number // 1300:08d}_{number:08d}.JPEG" for number in range(20_000))
    assert len(pickle.dumps(found)) < (33 + 4) * 20_000 + 1000


@given(names=names, places=slices)
def test_paths_are_names_behind_a_folder(names, places):
    paths = PathsBelow("/there", PackedIds(names))
    assert list(paths) == [f"/there/{name}" for name in names]
    assert paths[places] == [f"/there/{name}" for name in names][places]


def test_numbered_names_have_the_digits_of_the_last():
    assert list(NumberedIds("test/", 3)) == ["test/00000", "test/00001", "test/00002"]
    assert NumberedIds("", 10**7)[-1] == "9999999"


@pytest.mark.parametrize("largest", [0, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32])
def test_numbers_take_the_narrowest_type_that_holds_them(largest):
    found = narrowed(np.array([largest, 0]))
    assert found.tolist() == [largest, 0]
    assert found.itemsize == next(size for size in (1, 2, 4, 8) if largest < 256**size)
