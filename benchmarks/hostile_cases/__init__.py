"""The table of `hostile.py`: what is sound, how each case spoils it, and with which exit codes commands may end."""

from hostile_cases.common import COMMANDS, ENVIRONMENT, Case, import_libraries, making_sound
from hostile_cases.datasets import DATASETS
from hostile_cases.exported import EXPORTED
from hostile_cases.grown import GROWN, MADE
from hostile_cases.models import MODELS
from hostile_cases.pairings import PAIRINGS
from hostile_cases.runs import RUN_FOLDERS
from hostile_cases.servers import SERVERS
from hostile_cases.stores import STORES
from hostile_cases.texts import TEXTS
from hostile_cases.views import VIEWS
from tests.stage_one.apart import by_two

CASES: tuple[Case, ...] = (
    *(*DATASETS, *VIEWS, *MODELS, *STORES, *TEXTS, *PAIRINGS, *GROWN),
    *(*RUN_FOLDERS, *MADE, *EXPORTED, *SERVERS),
)

__all__ = ["CASES", "COMMANDS", "ENVIRONMENT", "by_two", "import_libraries", "making_sound"]
