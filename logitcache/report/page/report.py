"""The report on runs, sweeps, exported files and caches: one HTML file."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import RecipeError
from logitcache.report.beside_teachers import compare_beside_teachers
from logitcache.report.environment import environment
from logitcache.report.page.cache_sections import sections_of_cache
from logitcache.report.page.measured import measure_run
from logitcache.report.page.model_sections import sections_of_models
from logitcache.report.page.page import Section, Table, write_page
from logitcache.report.page.run_files import RunFiles, find_runs, read_runs
from logitcache.report.page.run_sections import provenance, sections_of_runs
from logitcache.report.page.sweep_sections import sections_of_sweeps
from logitcache.runtime.console import logger, track
from logitcache.shipping.exported import is_exported
from logitcache.shipping.model_table import ModelTable
from logitcache.shipping.table_formats import format_models, shown_models
from logitcache.store.remote.client import is_remote
from logitcache.student.evaluation.cost import LatencyPlan


@dataclass(frozen=True)
class ReportResult:
    """The page, its bytes, what it is of, and the runs whose models were run for it."""

    out: str
    bytes: int
    runs: int
    files: int
    caches: int
    measured: tuple[str, ...]


def write_report(
    paths: Sequence[str | Path],
    out: Path = Path("report.html"),
    overrides: Sequence[str] = (),
    trust: Collection[str] = (),
    *,
    measure: int = 8,
    points: int = 500,
    latency: bool = False,
) -> ReportResult:
    """Write a report on runs, folders of runs (sweeps), exported files and caches.

    The best `measure` runs are run over their validation images, and answer `points` images beside their teachers;
    `latency` times them. Exported files are compared with these runs, as by `evaluate`. `overrides` change the recipes
    of runs, as for `evaluate`; of caches alone, they locate the images. Raises RecipeError for a path that is none of
    these, and for a file that is not read.
    """
    caches = [str(path) for path in paths if _is_cache(str(path))]
    others = [Path(path).expanduser() for path in paths if not _is_cache(str(path))]
    files = [path for path in others if is_exported(path)]
    folders = [path for path in others if path not in files]
    found = {folder: find_runs(folder) for folder in folders}
    for folder, below in found.items():
        if not below:
            raise RecipeError(
                f"{folder} is no cache, no run, no folder of runs and no exported file. Fix: name the `out:` of a "
                "training, a folder with several, an ONNX file, or the `cache:` of a precompute recipe"
            )
    runs = read_runs(list(dict.fromkeys(run for below in found.values() for run in below)))
    sections: list[Section] = []
    measured: list[str] = []
    compared: list[Path] = []
    if runs:
        best = sorted((run for run in runs if run.result), key=lambda run: -(run.quality or 0.0))[:measure]
        models = [
            measure_run(run.path, run.name, [*overrides, *_granted(trust)], points, latency)
            for run in track(best, "measure runs", len(best), "runs")
        ]
        measured = [model.name for model in models]
        compared = [run.path for run, model in zip(best, models, strict=True) if model.tallies]
        for note in (f"{model.name}: {model.note}" for model in models if model.note):
            logger.info(note)
        speeds = {model.name: model.latency_ms for model in models if model.latency_ms is not None}
        sweeps = list(sections_of_sweeps(folders, runs))
        sections += [*sweeps, *sections_of_runs(runs, speeds, is_swept=bool(sweeps))]
        sections += sections_of_models(models) if models else ()
    if files:
        plan = LatencyPlan(batch_sizes=(1,)) if latency else None
        sections.append(_exported(compare_beside_teachers([*compared, *files], [*overrides, *_granted(trust)], plan)))
    for cache in caches:
        sections += sections_of_cache(cache, points, () if runs or files else overrides, trust)
    sections += [provenance(runs)] if runs else []
    here = environment()
    rows = [{"key": key, "value": str(value)} for key, value in here.items()]
    sections.append(Section("Environment of this report", tables=[Table("environment", rows)]))
    lead = _lead(runs, files, caches, measured)
    size = write_page(out, "logitcache report", lead, sections)
    return ReportResult(str(out), size, len(runs), len(files), len(caches), tuple(measured))


def _is_cache(path: str) -> bool:
    return is_remote(path) or (Path(path).expanduser() / "zarr.json").is_file()


def _granted(trust: Collection[str]) -> list[str]:
    return [f"trust=[{', '.join(trust)}]"] if trust else []


def _exported(table: ModelTable) -> Section:
    """Return the table of exported files beside runs and teachers."""
    text = f"{table.images} images, the same for all models, on {table.device}."
    rows = Table("models", shown_models(table), full_csv=format_models(table, "csv"))
    return Section("Exported files", text, tables=[rows])


def _lead(runs: Sequence[RunFiles], files: Sequence[Path], caches: Sequence[str], measured: Sequence[str]) -> str:
    parts = [f"{len(runs)} runs, of which {len(measured)} were measured again for this page"] if runs else []
    parts += [f"{len(files)} exported files"] if files else []
    return "; ".join([*parts, *caches]) + "."
