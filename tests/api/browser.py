"""A real Chromium, driven over chromedriver's W3C WebDriver interface: no client library needed."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEYS = {"enter": "\ue007", "shift": "\ue008", "escape": "\ue00c"}


def find_missing() -> str | None:
    """What has to be installed for the tests in a browser, or None."""
    if find_chromium() is None:
        return "no Chromium here (apt-get install chromium chromium-driver)"
    if shutil.which("chromedriver") is None:
        return "no chromedriver here (apt-get install chromium-driver)"
    return None


def find_chromium() -> str | None:
    """The browser's program."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Browser:
    """One window of a headless Chromium with a profile of its own.

    Args:
        folder: an empty one, for the profile.
        url: where relative paths lead.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._driver = subprocess.Popen(
            [shutil.which("chromedriver"), "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"HOME": str(folder)},
        )
        line = next(line for line in self._driver.stdout if "successfully on port" in line)
        port = re.search(r"on port (\d+)", line)[1]
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        options = {"binary": find_chromium(), "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        reply = self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()
        assert "sessionId" in reply["value"], reply
        self._session = f"/session/{reply['value']['sessionId']}"

    def close(self) -> None:
        """End browser and driver."""
        try:
            self._http.delete(self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(10)

    def command(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A WebDriver command. Raises AssertionError with the driver's message."""
        value = self._http.post(f"{self._session}/{path}", json=body or {}).json()["value"]
        assert not (isinstance(value, dict) and "error" in value), value["message"].splitlines()[0]
        return value

    def devtools(self, method: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.command("goog/cdp/execute", {"cmd": method, "params": params})

    def open(self, path: str = "/") -> None:
        """Load a page and wait until it has loaded."""
        self.command("url", {"url": self.url + path})

    def run(self, script: str, *args: Any) -> Any:
        """The value that a script returns."""
        return self.command("execute/sync", {"script": script, "args": list(args)})

    def wait(self, condition: str, seconds: float = 10.0) -> Any:
        """Wait for a JavaScript expression to become true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, f"not in {seconds} s: {condition}"
            time.sleep(0.02)
        return value

    def text(self, selector: str = "body") -> str:
        """Visible text of an element."""
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def click(self, selector: str) -> None:
        """Click an element as a mouse does: it must be visible and not covered."""
        element = self.command("element", {"using": "css selector", "value": selector})
        self.command(f"element/{next(iter(element.values()))}/click")

    def type(self, text: str, selector: str | None = None) -> None:
        """Type into an element, or wherever the focus is."""
        if selector is not None:
            element = self.command("element", {"using": "css selector", "value": selector})
        else:
            reply = self._http.get(f"{self._session}/element/active").json()
            element = reply["value"]
        self.command(f"element/{next(iter(element.values()))}/value", {"text": text})

    def press(self, *names: str) -> None:
        """Press keys together, wherever the focus is."""
        keys = [KEYS.get(name, name) for name in names]
        down = [{"type": "keyDown", "value": key} for key in keys]
        up = [{"type": "keyUp", "value": key} for key in reversed(keys)]
        source = {"type": "key", "id": "keyboard", "actions": down + up}
        self.command("actions", {"actions": [source]})

    def log(self) -> list[dict[str, Any]]:
        """Lines of the console, errors of the network and of policies among them, since last."""
        return self.command("se/log", {"type": "browser"})

    def screenshot(self, path: Path) -> None:
        """Save what the window shows."""
        data = self._http.get(f"{self._session}/screenshot").json()["value"]
        path.write_bytes(base64.b64decode(data))

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """Pretend to be a screen of this size."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=2 if is_phone else 1, mobile=is_phone)  # fmt: skip
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    def prefer(self, scheme: str) -> None:
        """Pretend that the system is in dark or light mode."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)
