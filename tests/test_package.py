"""The package as it is installed and imported."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import logitcache

ROOT = Path(__file__).parent.parent
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = BUILD["project"]


def test_public_names_are_sorted_and_there() -> None:
    assert list(logitcache.__all__) == sorted(logitcache.__all__)
    missing = [name for name in logitcache.__all__ if getattr(logitcache, name, None) is None]
    assert not missing
    assert set(logitcache.__all__) <= set(dir(logitcache))


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    [block] = [node for node in ast.parse(Path(logitcache.__file__).read_text()).body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found == {name: f"{home}.{name}" for name, home in logitcache._HOMES.items()}
    assert sorted([*found, "__version__"]) == logitcache.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = logitcache.no_such_name


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "zarr", "numpy", "dask", "pydantic"}
    code = f"import sys, logitcache; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_of_training_and_precompute_imports_no_torchvision() -> None:
    code = "import sys, logitcache.stage_one.precompute, logitcache.student.training; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout.split()


def test_links_of_the_readme_lead_to_the_repository_in_the_wheel_and_name_what_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for change in BUILD["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    homes = r"https://(raw\.githubusercontent\.com/logitcache/logitcache|github\.com/logitcache/logitcache/blob)/main/"
    assert len(links) > 40
    assert [link for link in links if not (ROOT / re.sub(homes, "", link).partition("#")[0]).exists()] == []
    assert [link for link in links if not re.match(homes, link)] == []


def test_the_installed_version_is_the_packages() -> None:
    assert importlib.metadata.version("logitcache") == logitcache.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", logitcache.__version__)


def test_the_changelog_tells_of_this_version() -> None:
    assert logitcache.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_all_extras_are_in_all() -> None:
    extras = PROJECT["optional-dependencies"]
    (every,) = extras["all"]
    named = set(every.removeprefix("logitcache[").removesuffix("]").split(","))
    assert named == set(extras) - {"all", "dev", "docs"}


MODULES = {
    "accelerate": "accelerate",
    "aiohttp": "aiohttp",
    "dask": "dask",
    "datasets": "datasets",
    "fsspec": "fsspec",
    "google-crc32c": "google_crc32c",
    "gradio": "gradio",
    "hypothesis": "hypothesis",
    "Jinja2": "jinja2",
    "keras": "keras",
    "lightning": "lightning",
    "jsonschema": "jsonschema",
    "lmdb": "lmdb",
    "matplotlib": "matplotlib",
    "mlflow-skinny": "mlflow",
    "moto": "moto",
    "numcodecs": "numcodecs",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "openvino": "openvino",
    "optuna": "optuna",
    "Pillow": "PIL",
    "pydantic": "pydantic",
    "pytest": "pytest",
    "PyYAML": "yaml",
    "rich": "rich",
    "s3fs": "s3fs",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "threadpoolctl": "threadpoolctl",
    "scipy": "scipy",
    "simplejpeg": "simplejpeg",
    "tensorboard": "tensorboard",
    "tensorstore": "tensorstore",
    "timm": "timm",
    "torch": "torch",
    "torchao": "torchao",
    "torch-pruning": "torch_pruning",
    "torchvision": "torchvision",
    "trackio": "trackio",
    "transformers": "transformers",
    "typer": "typer",
    "wandb": "wandb",
    "xarray": "xarray",
    "zarr": "zarr",
    "zarrs": "zarrs",
}
"""What a requirement is imported as; those of the core by the package, others by tests and benchmarks too."""

TOOLS = {
    "mkdocs-material": ("mkdocs.yml", r"name: material"),
    "mkdocstrings": ("mkdocs.yml", r"- mkdocstrings:"),
    "mypy": ("Makefile", r"-m mypy"),
    "pytest-xdist": ("Makefile", r"--numprocesses"),
    "ruff": ("Makefile", r"-m ruff"),
    "types-PyYAML": ("logitcache", r"import yaml"),  # the types that mypy reads
}
"""Requirements that nothing imports, and the use that each is for."""


def text_of(*names: str) -> str:
    """Return the text of files and of the Python files of folders."""
    paths = [
        path for name in names for path in ((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    return "\n".join(path.read_text() for path in paths)


def distributions(requirements: list[str]) -> set[str]:
    """Return the names of requirements, without the extras of this package."""
    return {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in requirements} - {"logitcache"}


def unused(names: set[str], text: str) -> list[str]:
    """Return the requirements that no line imports."""
    importing = r"(?:^\s*(?:import|from) |import_module\(\"|importorskip\(\"|find_spec\(\")"
    return [name for name in sorted(names) if not re.search(rf"{importing}{MODULES[name]}\b", text, re.MULTILINE)]


def test_every_dependency_is_imported_by_the_package() -> None:
    assert unused(distributions(PROJECT["dependencies"]), text_of("logitcache")) == []


def test_every_dependency_of_an_extra_is_imported_or_a_tool_that_is_used() -> None:
    extras = [requirement for requirements in PROJECT["optional-dependencies"].values() for requirement in requirements]
    names = distributions(extras)
    assert set(TOOLS) <= names
    assert unused(names - set(TOOLS), text_of("logitcache", "tests", "benchmarks")) == []
    idle = [name for name, (where, use) in TOOLS.items() if not re.search(use, text_of(where))]
    assert idle == []


def test_no_requirement_is_named_that_is_not_declared() -> None:
    every = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert set(MODULES) | set(TOOLS) == set().union(*map(distributions, every))


def test_extras_that_messages_name_exist() -> None:
    named = {
        extra
        for path in (ROOT / "logitcache").rglob("*.py")
        for extra in re.findall(r"(?:MissingExtraError|needs_extra)\([^)]*?, \"(\w+)\"\)", path.read_text())
    }
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    stated = dict(line.split("==") for line in (ROOT / ".ci/oldest.txt").read_text().split() if "==" in line)
    extras = PROJECT["optional-dependencies"]
    tested = ("timm", "xarray", "cluster", "s3", "http", "report")
    every = [*PROJECT["dependencies"], *(line for extra in tested for line in extras[extra])]
    bounds = dict(re.findall(r"^([\w-]+)(?:\[.*\])?>=([\d.]+)$", "\n".join(every), re.MULTILINE))

    def padded(version: str) -> str:
        return ".".join([*version.split("."), "0", "0"][:3])

    others = {"distributed", "aiobotocore", "boto3", "pyparsing"}  # dask's own, what s3fs takes, matplotlib's
    assert {name: padded(version) for name, version in stated.items() if name not in others} == {
        name: padded(version) for name, version in bounds.items()
    }
    assert stated["distributed"] == stated["dask"]
