"""Headless Chromium, driven by its DevTools protocol: what a page shows, asks for and complains of."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
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

    async def act(tab: Tab) -> None:
        for width in widths:
            await tab.open(page.as_uri(), width, scheme)
            if screenshots is not None:
                await tab.screenshot(screenshots / f"{page.stem}-{width}-{scheme}.png")
        tab.seen.values = [await tab.value(expression) for expression in expressions]
        tab.seen.pdf = base64.b64decode((await tab.call("Page.printToPDF"))["data"])

    return use(act)


def use(act: Callable[["Tab"], Awaitable[None]]) -> Seen:
    """Let a function act in a tab of a fresh browser."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-background-networking"]
        process = subprocess.Popen(
            [PROGRAM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return asyncio.run(asyncio.wait_for(_drive(Path(profile), act), SECONDS))
        finally:
            process.kill()
            process.wait()


async def _drive(profile: Path, act: Callable[["Tab"], Awaitable[None]]) -> Seen:
    opened = profile / "DevToolsActivePort"
    while not (opened.exists() and len(opened.read_text().splitlines()) == 2):
        await asyncio.sleep(0.05)
    port = opened.read_text().split()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
            (target,) = [one for one in await response.json() if one["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
                await tab.call(f"{domain}.enable")
            await act(tab)
            return tab.seen


class Tab:
    """A tab of the browser, and what it has `seen`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self.seen = socket, 0, Seen()
        self._events: list[str] = []

    async def open(self, url: str, width: int, scheme: str = "light") -> None:
        """Open a page at a width, and wait until it is loaded."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self._events.clear()
        await self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            await self._receive()
        await self.measure(width)

    async def measure(self, width: int) -> None:
        """Note how far the page scrolls sideways."""
        self.seen.widths[width] = await self.value("document.documentElement.scrollWidth")

    async def screenshot(self, file: Path) -> None:
        """Write a picture of the whole page."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    async def choose(self, selector: str, file: Path) -> None:
        """Choose a file in an input, as a user who drops it there."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    async def write(self, selector: str, text: str) -> None:
        """Write into a field, and press Enter."""
        await self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            await self.call("Input.dispatchKeyEvent", type=kind, **key)

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        while not (found := await self.value(expression)):
            await asyncio.sleep(0.1)
        return found

    async def value(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol, and return its result."""
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
