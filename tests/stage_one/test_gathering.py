"""Values that are computed apart come in order, whoever computes them."""

import pickle
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import CacheError, MissingExtraError, RecipeError
from logitcache.stage_one.cluster import cluster, workers
from logitcache.stage_one.cluster.cluster import HERE, Cluster, LostScheduler, gathered


def doubled(number: int) -> int:
    if number == 7:
        raise CacheError("seven is damaged")
    return 2 * number


@given(st.permutations(range(12)))
def test_whatever_order_they_arrive_in_values_come_in_that_of_their_tasks(order: list[int]) -> None:
    assert [*cluster._in_order((number, str(number)) for number in order)] == [str(number) for number in range(12)]


def test_without_a_cluster_they_are_computed_here_one_after_the_other() -> None:
    values = gathered(doubled, range(10), "double", "numbers", HERE)
    assert [next(values) for _ in range(7)] == [*range(0, 14, 2)]
    with pytest.raises(CacheError, match="seven is damaged"):
        next(values)


def test_a_users_error_comes_back_as_a_value() -> None:
    opener = pickle.dumps(partial(nullcontext, doubled))
    error = workers.call("doubled", opener, None, 7)
    assert isinstance(error, CacheError)
    assert str(error).startswith("seven is damaged\n  On worker: ")
    assert workers.call("doubled", opener, None, 4) == 8
    workers.release("doubled")


def one(where: Cluster) -> None:
    next(gathered(doubled, [1], "double", "numbers", where))


def test_where_no_scheduler_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "FIRST", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RecipeError, match=f"no scheduler answers at {address}"):
        one(Cluster(scheduler=address))
    with pytest.raises(RecipeError, match="either at an address or of this machine"):
        one(Cluster(address, 2))


def test_a_scheduler_that_is_lost_ends_it_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*given: Any, **options: Any) -> Iterator[Any]:
        raise LostScheduler("the scheduler is gone")
        yield

    monkeypatch.setattr(cluster, "results", lost)
    with pytest.raises(CacheError, match=r"double: the scheduler is gone\. Fix: start the scheduler"):
        one(Cluster(scheduler="tcp://a:1"))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"logitcache\[cluster\]"):
        one(Cluster(workers=2))


@pytest.mark.usefixtures("warm_workers")
def test_workers_of_this_machine_are_started_and_ended() -> None:
    assert [*gathered(abs, range(-20, 0), "count", "numbers", Cluster(workers=2))] == [*range(20, 0, -1)]
