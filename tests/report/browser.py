"""Headless Chromium, driven by its DevTools protocol: what a page shows, asks for and complains of."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SECONDS = 120


@dataclass
class Seen:
    """What a browser saw of a page: by width how far it scrolls sideways, its errors, and what it asked for."""

    widths: dict[int, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    pdf: bytes = b""


def look(
    page: Path,
    widths: Sequence[int] = (390, 1280),
    scheme: str = "light",
    screenshots: Path | None = None,
    expressions: Sequence[str] = (),
) -> Seen:
    """Open a file at each width; evaluate expressions in it at the last one."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-background-networking"]
        process = subprocess.Popen(
            [PROGRAM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return asyncio.run(
                asyncio.wait_for(_drive(Path(profile), page, widths, scheme, screenshots, expressions), SECONDS)
            )
        finally:
            process.kill()
            process.wait()


async def _drive(
    profile: Path, page: Path, widths: Sequence[int], scheme: str, screenshots: Path | None, expressions: Sequence[str]
) -> Seen:
    opened = profile / "DevToolsActivePort"
    while not (opened.exists() and len(opened.read_text().splitlines()) == 2):
        await asyncio.sleep(0.05)
    port = opened.read_text().split()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
            (target,) = [one for one in await response.json() if one["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            return await _Tab(socket).visit(page, widths, scheme, screenshots, expressions)


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self.seen = socket, 0, Seen()
        self._events: list[str] = []

    async def visit(
        self, page: Path, widths: Sequence[int], scheme: str, screenshots: Path | None, expressions: Sequence[str]
    ) -> Seen:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self._call("Emulation.setEmulatedMedia", features=features)
        for width in widths:
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            await self._call("Emulation.setDeviceMetricsOverride", **metrics)
            self._events.clear()
            await self._call("Page.navigate", url=page.as_uri())
            while "Page.loadEventFired" not in self._events:
                await self._receive()
            self.seen.widths[width] = await self._value("document.documentElement.scrollWidth")
            if screenshots is not None:
                shot = await self._call("Page.captureScreenshot", captureBeyondViewport=True)
                (screenshots / f"{page.stem}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
        self.seen.values = [await self._value(expression) for expression in expressions]
        self.seen.pdf = base64.b64decode((await self._call("Page.printToPDF"))["data"])
        return self.seen

    async def _value(self, expression: str) -> Any:
        found = await self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := await self._receive()).get("id") != number:
            pass
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    async def _receive(self) -> dict[str, Any]:
        """Take one message, and note what an event reports."""
        message: dict[str, Any] = json.loads(await self._socket.receive_str())
        method, told = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.seen.errors.append(told["entry"]["text"])
        elif method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and told["type"] == "error"):
            self.seen.errors.append(json.dumps(told)[:300])
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.seen.requests.append(told["request"]["url"])
        return message
