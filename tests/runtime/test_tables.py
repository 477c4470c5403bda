import pytest

from logitcache.runtime.tables import as_text, format_bytes


def test_results_are_aligned_text_in_a_pipe():
    text = as_text(
        {
            "cache": {"path": "a.zarr", "bytes": 12_345_678, "seconds": 1.2345},
            "complete": True,
            "seconds": [61.234, 75.0],
            "starting_seconds": [2.0, 2.0],
            "teacher": None,
            "problems": [],
            "sizes": list(range(1000)),
            "encoding": {"kind": "head", "module": None, "sizes": [1, 2]},
            "model": {"kind": "timm", "options": {"block_args": [1] * 1000, "layers": [2, 2]}},
            "drawn": [{"kind": "flip", "p": 0.5}, {"kind": "blur", "exact": True}],
            "students": [{"name": "cached", "top1": 0.79012}, {"name": "labels", "seeds": 3}],
        }
    )
    assert text.splitlines() == [
        "cache.path        a.zarr",
        "cache.bytes       12.3 MB",
        "cache.seconds     1.23 s",
        "complete          yes",
        "seconds           61.2 s to 75 s",
        "starting_seconds  2 s",
        "teacher           -",
        "problems          -",
        "sizes             1000 entries",
        "encoding          {kind: head, module: null, sizes: [1, 2]}",
        "model             {kind: timm, options: {block_args: 1000 entries, layers: [2, 2]}}",
        "drawn             {kind: flip, p: 0.5}, {kind: blur, exact: true}",
        "",
        "students:",
        "  name    top1    seeds",
        "  cached  0.7901  -",
        "  labels  -       3",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (5 * 10**15, "5e+03 TB")],
)
def test_bytes_have_three_digits_and_a_unit(count, text):
    assert format_bytes(count) == text


def test_a_long_table_says_how_much_of_it_is_shown():
    lines = as_text({"rows": [{"label": label} for label in range(1000)]}).splitlines()
    assert "rows, the first 40 of 1000 (--json has all):" in lines
    assert lines[-1].strip() == "39"
