"""Files that ship with the package: recipes, schemas, and the bundled images and teacher."""

from pathlib import Path


def shipped_folder(name: str) -> Path:
    """Return a folder such as `pipelines`: inside the package if it is installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
