"""Places of the Hugging Face Hub, as `hf://owner/name`, beside folders on this machine."""

import re
from pathlib import Path

from logitcache.errors import RecipeError

SCHEME = "hf://"
_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def hub_name(path: str, area: str = "") -> str | None:
    """Return `owner/name` of `hf://AREAowner/name`; None for a path on this machine. Raises RecipeError."""
    if not path.startswith(SCHEME):
        return None
    name = path.removeprefix(SCHEME + area)
    if not _NAME.fullmatch(name):
        raise RecipeError(f"'{path}' names nothing on the Hub. Fix: {SCHEME}{area}OWNER/NAME")
    return name


def local_folder(path: str, revision: str | None, area: str = "") -> Path:
    """Return a folder on this machine. Raises RecipeError if it is missing, or if a revision of it is asked for."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise RecipeError(
            f"the folder '{folder}' {state}.\n  Fix: correct `path`; a name of the Hub is {SCHEME}{area}OWNER/NAME"
        )
    if revision is not None:
        raise RecipeError(
            f"the folder '{folder}' has no revision '{revision}': folders have none. Fix: leave `revision` out"
        )
    return folder
