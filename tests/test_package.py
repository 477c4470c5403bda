"""The package as it is installed and imported."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import logitcache

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_public_names_are_sorted_and_there() -> None:
    assert list(logitcache.__all__) == sorted(logitcache.__all__)
    missing = [name for name in logitcache.__all__ if getattr(logitcache, name, None) is None]
    assert not missing
    assert set(logitcache.__all__) <= set(dir(logitcache))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = logitcache.no_such_name


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "zarr", "numpy", "dask", "pydantic"}
    code = f"import sys, logitcache; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_installed_version_is_the_packages() -> None:
    assert importlib.metadata.version("logitcache") == logitcache.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", logitcache.__version__)


def test_the_changelog_tells_of_this_version() -> None:
    assert logitcache.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_all_extras_are_in_all() -> None:
    extras = PROJECT["optional-dependencies"]
    (every,) = extras["all"]
    named = set(every.removeprefix("logitcache[").removesuffix("]").split(","))
    assert named == set(extras) - {"all", "dev"}


def test_extras_that_messages_name_exist() -> None:
    named = {
        extra
        for path in (ROOT / "logitcache").rglob("*.py")
        for extra in re.findall(r"MissingExtraError\([^)]*?, \"(\w+)\"\)", path.read_text())
    }
    assert named
    assert named <= set(PROJECT["optional-dependencies"])
