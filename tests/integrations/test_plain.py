"""Plain loops over a loader: each pass reads the epoch that was set."""

from pathlib import Path

from tests.integrations.loops import EPOCHS, expected, loader_of, plain, require_equal, top_k_cache


def test_set_epoch_and_iteration_equal_epochs_by_number(tmp_path: Path) -> None:
    cache = top_k_cache(tmp_path)
    weights, keys = expected(cache)
    assert {view for batch in keys for view, _ in batch} == {0, 1}
    for name in ("loader", "sampler"):
        loader = loader_of(cache)
        chooser = loader if name == "loader" else loader.sampler

        def epochs(loader=loader, chooser=chooser):
            for epoch in range(EPOCHS):
                chooser.set_epoch(epoch)
                yield loader

        found, seen = plain(epochs())
        assert seen == keys
        require_equal(found, weights)
