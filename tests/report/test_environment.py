import getpass
import json
import platform
from pathlib import Path

import logitcache
from logitcache.report.environment import environment


def test_environment_is_json_with_versions_and_names_no_one():
    found = environment()
    text = json.dumps(found)
    assert found["logitcache"] == logitcache.__version__
    assert found["libraries"]["torch"]
    assert found["cpu"]["cores"] >= 1
    assert str(Path.home().resolve()) not in text or str(Path.home()) == "/"
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text
