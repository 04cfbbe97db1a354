"""A browser of this machine, and TensorBoard with records of every kind on each of its backends."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorboard_data_server
from playwright.sync_api import expect, sync_playwright

from tests.browser import runs

expect.set_options(timeout=15_000)  # other sessions may run at the same time

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AXE = Path(__file__).parents[2] / "frontend" / "node_modules" / "axe-core" / "axe.min.js"
# A browser on its own calls home; what the page asks for is to be told from that.
QUIET = ("background-networking", "component-update", "sync", "default-apps", "gpu")


class TensorBoard:
    """A TensorBoard of its own process on a free port."""

    def __init__(self, logdir, folder, *, fast):
        self.said = folder / "tensorboard.log"
        command = ["--logdir", str(logdir), "--port", "0", f"--load_fast={'true' if fast else 'false'}"]
        with self.said.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tensorboard.main", *command], stdout=log, stderr=log
            )
        end = time.monotonic() + 60
        while not (found := re.search(r"http://(localhost:\d+)/", self.said.read_text())):
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)
        self.address = f"http://{found[1]}/"

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="session")
def logdir(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    for name, make in runs.KINDS.items():
        make(top / name)
    runs.hostile(top / "<b>bold")
    return top


@pytest.fixture(scope="session")
def tensorboard(logdir, tmp_path_factory):
    """TensorBoard that reads in Python; most tests need only one."""
    server = TensorBoard(logdir, tmp_path_factory.mktemp("log"), fast=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def fast_tensorboard(logdir, tmp_path_factory):
    if tensorboard_data_server.server_binary() is None:
        pytest.skip("there is no data server for this machine")
    server = TensorBoard(logdir, tmp_path_factory.mktemp("log"), fast=True)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def chromium():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is none of {', '.join(BROWSERS)} on this machine")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", *(f"--disable-{what}" for what in QUIET)]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A window, and everything that went wrong in it."""

    def __init__(self, browser, *, width=1280, height=1000, dark=False):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.window = self.context.new_page()
        self.window.set_default_timeout(15_000)
        self.wrong, self.requests = [], []
        self.listening = True
        self.window.on("console", self._console)
        self.window.on("pageerror", lambda error: self.wrong.append(str(error)) if self.listening else None)
        self.window.on("request", lambda request: self.requests.append(request.url))

    def _console(self, message):
        # a window without TensorBoard around it has no icon; TensorBoard's own bundle warns about its own parts
        if self.listening and message.type == "error" and not message.location["url"].endswith("/favicon.ico"):
            self.wrong.append(f"{message.text} {message.location}")

    def tab(self, server, place=""):
        """Open the tab, and return what locates things in it once there is something to see."""
        if self.window.url.startswith(server.address):
            self.window.goto("about:blank")  # an address that differs in its fragment alone loads nothing
        self.window.goto(f"{server.address}#bnwatch{place}")
        frame = self.window.frame_locator("iframe")
        frame.locator("#bnwatch h1").wait_for()
        frame.locator(".loading").wait_for(state="hidden")
        return frame

    def page(self, server, place=""):
        """Open the page of the tab alone, without TensorBoard around it, which takes seconds to load."""
        self.window.goto(f"{server.address}data/plugin_entry.html?name=bnwatch#{place.removeprefix('&')}")
        self.window.evaluate("import('./index.js').then((page) => page.render())")
        self.window.locator(".loading").wait_for(state="hidden")
        return self.window

    def hash(self):
        return self.window.evaluate("decodeURIComponent(location.hash)")

    def closed(self):
        """Close, and hold that nothing went wrong and nothing was asked for elsewhere."""
        self.context.close()
        assert not self.wrong
        strangers = [url for url in self.requests if not re.match(r"(http://localhost:|data:|blob:|about:|file:)", url)]
        assert not strangers


@pytest.fixture
def visit(chromium):
    opened = []

    def make(**how):
        opened.append(Visit(chromium, **how))
        return opened[-1]

    yield make
    for one in opened:
        one.closed()


def faults(page):
    """Return what axe-core finds serious or critical in a frame or window."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: run `npm --prefix frontend ci`")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{rule['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for rule in found["violations"]
        if rule["impact"] in {"serious", "critical"}
        for node in rule["nodes"]
    ]
