"""Send to an HTTP service the views that `materialize` wrote as WebDataset: URL VIEWS ANSWERS.jsonl.

A view is posted as PNG; the service returns {"logits": [...]}, or the most probable classes and log_probabilities.
At a rate limit (429, or 503) the script waits as long as Retry-After asks. Every answer is written as it comes, and the
same command continues where it stopped.
"""

import json
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ATTEMPTS, PAUSE = 20, 1.0


def views_of(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the facts and the PNG of every view."""
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as archive:
            members = iter(archive)
            for picture, facts in zip(members, members, strict=True):
                content, text = archive.extractfile(picture), archive.extractfile(facts)
                assert content is not None
                assert text is not None
                yield json.loads(text.read()), content.read()


def ask(url: str, picture: bytes) -> dict[str, Any]:
    """Post a picture until it is answered, and wait as the service asks. Raises the last error."""
    for attempt in range(1, ATTEMPTS + 1):
        request = urllib.request.Request(url, picture, {"Content-Type": "image/png"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in (429, 503) or attempt == ATTEMPTS:
                    raise
                time.sleep(float(error.headers.get("Retry-After") or PAUSE))
    raise AssertionError("the last attempt answers or raises")


def answered(file: Path) -> set[str]:
    """Return the keys that are answered; the line of a stop that is not whole is cut off."""
    if not file.exists():
        return set()
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return {json.loads(line)["key"] for line in whole.splitlines()}


def main(url: str, views: Path, answers: Path) -> None:
    """Ask for every view that is not answered yet."""
    done = answered(answers)
    with open(answers, "a") as stream:
        for facts, picture in views_of(views):
            if facts["key"] not in done:
                row = {"key": facts["key"], "crc32": facts["crc32"], **ask(url, picture)}
                stream.write(json.dumps(row) + "\n")
                stream.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
