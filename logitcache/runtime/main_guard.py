"""Refuse scripts that worker processes would run a second time."""

import ast
import sys
from pathlib import Path
from types import FrameType

from logitcache.errors import RecipeError


def require_main_guard(what: str) -> None:
    """Raise RecipeError if the running script starts processes outside `if __name__ == "__main__":`.

    A process that is not forked imports the script again, and would start processes in turn. Scripts whose source
    cannot be read are accepted.
    """
    main = sys.modules["__main__"]
    frame, path = _frame_of(vars(main)), getattr(main, "__file__", None)
    if frame is None or path is None or _is_guarded(Path(path), frame.f_lineno):
        return
    raise RecipeError(
        f"{path}:{frame.f_lineno} starts processes ({what}), and each of them would run the script again.\n"
        f"  Fix: put the code that {Path(path).name} runs below `if __name__ == '__main__':`, or take no worker "
        "processes (num_workers 0)"
    )


def _frame_of(namespace: dict[str, object]) -> FrameType | None:
    """Return the frame that runs the top level of a module in this thread, if one does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not (frame.f_globals is namespace and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    return frame


def _is_guarded(path: Path, line: int) -> bool:
    """Return whether a line lies in or after a top-level `if` that tests `__name__`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    tests = (node.test for node in tree.body if isinstance(node, ast.If) and node.lineno <= line)
    return any(isinstance(name, ast.Name) and name.id == "__name__" for test in tests for name in ast.walk(test))
