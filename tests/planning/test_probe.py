"""What a probe makes of what it measures: extrapolated bytes against real shards, medians against made-up clocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayLayout, Order
from logitcache.cache.write.writer import ShardEncoder
from logitcache.planning import compression, probe
from logitcache.planning.compression import EncodeCost, payload
from logitcache.planning.dry_run import correction, dry_run
from logitcache.planning.probe import Mark, Measured
from logitcache.store.shards import Shard
from tests.cache.made import COUNT, PACKED_TOP2, Linear, Pixels, recipe, teacher

ROWS = 8192


def array_of(order: Order, width: int = 40) -> ArrayLayout:
    return ArrayLayout("t.a", "a", (width,), np.dtype("int8"), ("c",), 1, ROWS, ROWS, "packed", order)


@pytest.mark.parametrize("order", ["sample", "component"])
@pytest.mark.parametrize("count", [300, 700, 3000, ROWS])
def test_part_of_a_shard_tells_what_the_whole_compresses_to(order: Order, count: int) -> None:
    array, generator = array_of(order), np.random.default_rng(0)
    values = generator.normal(0, 3, (ROWS, 40)).round().astype(np.int8)
    stored = len(ShardEncoder(array).encode(Shard(0, 0, ROWS), values)) - array.hot_bytes(0)
    assert payload(array, values[:count], ROWS) == pytest.approx(stored / ROWS, rel=0.05)


def marks(seconds: list[float], rows: int = 10) -> list[Mark]:
    """Note batches that took these seconds, half of them in the teacher and a quarter waiting."""
    clock = np.cumsum([0.0, *seconds]).tolist()
    return [Mark(number * rows, at, 2 * at, at / 4, at / 2) for number, at in enumerate(clock)]


def test_the_first_batches_and_a_stall_do_not_count() -> None:
    found = Measured.of(marks([9.0, 1.0, 1.0, 50.0, 1.0, 1.0, 1.0]), num_workers=0)
    assert (found.loop[1], found.answer, found.keep, found.cores) == pytest.approx((0.1, 0.05, 0.025, 0.2))


def test_batches_that_come_in_turns_are_looked_at_together() -> None:
    found = Measured.of(marks([9.0] * 5 + [3.0, 0.0] * 8), num_workers=2)
    assert found.loop == pytest.approx(0.15)


def test_a_machine_that_others_use_meanwhile_gives_a_range() -> None:
    found = Measured.of(marks([9.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 1.0]), num_workers=0)
    assert found.loop.tolist() == pytest.approx(
        np.quantile([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.1], (0.25, 0.5, 0.75))
    )
    # The first batch is cold.
    least, _, most = correction(calibrated([1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]), 1010, 0, pace=9.0)
    assert (least, most) == pytest.approx((1000 * 0.2 - 14.0, 1000 * 0.275 - 14.0))


def test_one_batch_is_all_there_is() -> None:
    assert Measured.of(marks([2.0]), num_workers=4).loop == pytest.approx(0.2)


def calibrated(seconds: list[float], rows: int = 10) -> list[tuple[int, float]]:
    """Note calibration batches that took these seconds after the first, which ended at 7 s."""
    return [((number + 1) * rows, at) for number, at in enumerate(np.cumsum([7.0, *seconds]).tolist())]


def test_a_stall_does_not_count_in_calibration() -> None:
    assert correction(calibrated([1.0] * 4 + [50.0] + [1.0] * 4), 100, 0, pace=9.0) == pytest.approx(-49.0)
    assert correction(calibrated([1.0] * 9), 100, 0, pace=9.0) == pytest.approx(0.0)


def test_calibration_on_more_rows_takes_as_much_longer() -> None:
    assert correction(calibrated([1.0] * 9), 250, 0, pace=9.0) == pytest.approx(15.0)
    assert correction(calibrated([3.0, 0.0] * 8, rows=5), 205, 2, pace=9.0) == pytest.approx(200 * 0.3 - 24.0)
    assert correction(calibrated([]), 30, 0, pace=0.5) == pytest.approx(10.0)


def test_sums_over_a_shard_are_no_rows_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding takes 1 s and 0.5 s a row here; statistics of errors, a row for each shard, are written once."""

    def encoded(array: ArrayLayout, values: NDArray[Any], repeats: int = 1) -> EncodeCost:
        seconds = 0.5 + 0.5 * len(values)
        return EncodeCost(100, seconds, seconds)

    monkeypatch.setattr(compression, "encoded", encoded)
    with dry_run(
        recipe(tmp_path / "c", teachers={"t": teacher(PACKED_TOP2)}, shard_rows=128),
        teachers={"t": Linear()},
        dataset=Pixels(COUNT),
    ) as run:
        found = probe.probe(run)
    names = [array.name for array in run.todo.layout.arrays]
    assert "t.logits.errors" in names
    assert found.write == pytest.approx(0.5 * (len(names) - 1))
    assert found.write_shard == pytest.approx(1.0 * len(names))
    assert not list(tmp_path.iterdir())


def test_a_probe_is_of_what_is_asked_for(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "c", batch_size=20)
    with dry_run(plan, teachers={"t": Linear()}, dataset=Pixels(COUNT)) as run:
        found = {batches: probe.probe(run, batches) for batches in (1, 7, 1000)}
    # Shards of 128 rows are six batches of 20 and one of 8, the last shard of a view has 44 rows.
    assert [(one.batches, one.rows) for one in found.values()] == [(1, 20), (7, 128), (34, 600)]
