"""The page in Chromium: no error, nothing from the network, no overflow on a narrow screen, printable."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here: the page is not looked at")


class Chromium:
    """A page in headless Chromium, told what to do over the DevTools protocol's pipe.

    Attributes:
        events: everything that the browser reported so far.
    """

    def __init__(self, profile: Path) -> None:
        commands, self._to = os.pipe()
        self._from, replies = os.pipe()

        def wire() -> None:  # the protocol wants commands on 3 and replies on 4
            taken = os.dup(commands), os.dup(replies)
            os.dup2(taken[0], 3)
            os.dup2(taken[1], 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(replies)
        self.events: list[dict[str, Any]] = []
        self._number, self._rest, self._session = 0, b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{part}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, page: Path) -> None:
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def resize(self, width: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)

    def seen(self, method: str) -> list[Any]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 16)
            assert piece, "Chromium ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def page(busy_page: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_bytes(busy_page)
    return file


def test_the_page_opens_without_an_error_and_asks_the_network_for_nothing(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert browser.value("document.querySelectorAll('h2').length") > 10
    asked = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    complaints = [browser.seen(kind) for kind in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert complaints == [[], []] and browser.seen("Runtime.exceptionThrown") == []


def test_the_browser_forbids_the_page_what_it_does_not_need(browser: Chromium, page: Path, tmp_path: Path) -> None:
    bad = b"<script>document.title = 'run'</script><img src='https://example.org/x.png'></body>"
    edited = tmp_path / "edited.html"
    edited.write_bytes(page.read_bytes().replace(b"</body>", bad))
    browser.open(edited)
    assert browser.value("document.title") != "run"
    assert len(browser.seen("Log.entryAdded")) >= 2, "each was refused by the page's own policy"


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Chromium, page: Path, width: int) -> None:
    browser.open(page)
    browser.resize(width)
    assert browser.value("window.innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .skip') && "
    wide += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    assert browser.value(wide) == []


def test_wide_tables_can_be_scrolled_by_keyboard(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.resize(400)
    boxes = "[...document.querySelectorAll('table')].every(t => { const b = t.closest('.scroll'); "
    boxes += "return b && b.tabIndex === 0 && b.getAttribute('role') === 'region' && b.getAttribute('aria-label') })"
    assert browser.value(boxes) is True
    assert browser.value("[...document.querySelectorAll('.scroll')].some(b => b.scrollWidth > b.clientWidth)") is True


def test_it_prints_on_a4_and_no_table_is_cut(browser: Chromium, page: Path) -> None:
    browser.open(page)
    pdf = base64.b64decode(browser.ask("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") > 3
    assert b"594.9" in pdf or b"595" in pdf, "A4"
    browser.ask("Emulation.setEmulatedMedia", media="print")
    browser.resize(688)  # 182 mm at 96 dpi: what the page's margins leave of A4
    cut = "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth + 1)"
    cut += ".map(t => t.caption.innerText)"
    assert browser.value(cut) == []
    assert browser.value("getComputedStyle(document.querySelector('thead')).display") == "table-header-group"
    browser.ask("Emulation.setEmulatedMedia", media="")
