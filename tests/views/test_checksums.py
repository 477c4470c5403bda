"""Row checksums: one number per image, whatever its layout; a differing row is named."""

import zlib

import numpy as np
import pytest
import torch

from logitcache.errors import ReplayMismatchError
from logitcache.views.checksums import require_rows, row_checksums
from logitcache.views.keys import ViewKey

IMAGES = torch.randint(0, 256, (5, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KEYS = [ViewKey(2, index) for index in (4, 0, 3, 1, 2)]
IDS = [f"photo {index}" for index in range(5)]


def test_a_checksum_is_the_crc_32_of_the_pixels_in_order() -> None:
    found = row_checksums(IMAGES)
    assert (found.dtype, found.shape) == (np.uint32, (5,))
    assert found.tolist() == [zlib.crc32(bytes(image.flatten().tolist())) for image in IMAGES]
    assert row_checksums(torch.tensor([49, 50, 51, 52, 53, 54, 55, 56, 57], dtype=torch.uint8).view(1, 1, 3, 3)) == [
        0xCBF43926  # the check value of the CRC's definition
    ]


def test_layout_batch_and_order_do_not_matter() -> None:
    whole = row_checksums(IMAGES)
    assert np.array_equal(row_checksums(IMAGES.contiguous(memory_format=torch.channels_last)), whole)
    assert np.array_equal(row_checksums(IMAGES.flip(0)), whole[::-1])
    assert [int(row_checksums(IMAGES[row : row + 1])[0]) for row in range(5)] == whole.tolist()
    assert row_checksums(IMAGES[:0]).shape == (0,)


def test_one_changed_level_changes_the_checksum() -> None:
    whole = row_checksums(IMAGES)
    for place in range(0, IMAGES[0].numel(), 13):
        changed = IMAGES.clone()
        changed[3].view(-1)[place] ^= 1
        assert (row_checksums(changed) != whole).tolist() == [False, False, False, True, False]


def test_the_first_other_row_is_named_with_both_checksums_and_the_fix() -> None:
    recorded = row_checksums(IMAGES)
    require_rows(IMAGES, KEYS, recorded, IDS)
    changed = IMAGES.clone()
    changed[[2, 4], 0, 0, 0] ^= 255
    with pytest.raises(ReplayMismatchError) as refused:
        require_rows(changed, KEYS, recorded, IDS)
    message = str(refused.value)
    assert message.startswith("view 2 of image 'photo 3' (index 3) is not the one that the teacher saw")
    for part in (f"{row_checksums(changed)[2]:08x}", f"{recorded[2]:08x}", "2 of the batch's 5 images", "Fix: "):
        assert part in message
