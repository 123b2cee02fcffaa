"""The page of the server in a real browser: what it shows of a busy and an empty server, and of one that refuses, fails
or is gone."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.apps_serve.helpers import Server

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs Chromium and chromedriver")
PAGE = Path(__file__).parents[2] / "apps" / "serve" / "page.html"
EMPTY: dict[str, Any] = {
    "version": "0.1.0", "model": "demo", "adapters": [], "uptime_seconds": 61.0, "batches": [], "engine": {},
    "tokens_per_second": {"generated": 0.0, "prompt": 0.0}, "tokens": {"prompt": 0, "generated": 0},
    "passes": {"count": 0, "last_seconds": 0.0},
    "sequences": {"running": 0, "aside": 0, "block": 0, "interactive": 0, "interactive_limit": 64, "batch": 0},
    "limits": {"resource": None, "resources": {}, "predicted_pass_seconds": None},
}  # fmt: skip
BUSY = EMPTY | {
    "model": "llama-3-70b", "adapters": ["terse"], "uptime_seconds": 93784.0,
    "tokens_per_second": {"generated": 1834.25, "prompt": 12250.0},
    "tokens": {"prompt": 40_000_000, "generated": 9_123_456}, "passes": {"count": 5123, "last_seconds": 4.2},
    "sequences": {"running": 760, "aside": 12, "block": 768, "interactive": 3, "interactive_limit": 64, "batch": 1536},
    "batches": [
        {"id": "batch_4664758b4d0377644164e4f4", "status": "in_progress", "endpoint": "/v1/chat/completions",
         "created_at": 1795783814, "metadata": {"name": "<b>Summaries</b><script>document.title='bad'</script>"},
         "running": True, "request_counts": {"total": 1_000_000, "completed": 412_345, "failed": 120},
         "eta_seconds": 40210.5},
        {"id": "batch_1f033b2f759f661d9af5b769", "status": "in_progress", "endpoint": "/v1/completions",
         "created_at": 1795783900, "metadata": None, "running": False, "eta_seconds": None,
         "request_counts": {"total": 0, "completed": 0, "failed": 0}},
        {"id": "batch_2", "status": "cancelling", "endpoint": "/v1/completions", "created_at": 1795783901,
         "metadata": {}, "running": True, "eta_seconds": None,
         "request_counts": {"total": 200, "completed": 50, "failed": 0}},
    ],
    "limits": {
        "resource": "host_to_device",
        "resources": {
            "host_to_device": {"predicted_seconds": 4.0, "measured_seconds": 4.1},
            "gpu_compute": {"predicted_seconds": 2.5, "measured_seconds": None},
            "disk_read": {"predicted_seconds": 0.0, "measured_seconds": 0.0},
            "cpu_attention": {"predicted_seconds": 1.9, "measured_seconds": 2.2},
        },
        "predicted_pass_seconds": 4.05, "measured_pass_seconds": 4.2, "bound_tokens_per_second": 1910.0,
    },
    "engine": {
        "realized_percent": {"weights": {"gpu": 20.5, "cpu": 79.5, "disk": 0.0},
                             "cache": {"gpu": 0.0, "cpu": 60.0, "disk": 40.0},
                             "activations": {"gpu": 100.0, "cpu": 0.0, "disk": 0.0}},
        "peak_bytes": {"gpu": 70 * 2**30, "cpu": 200 * 2**30, "disk": 2**38},
        "budgets": {"gpu": 78 * 2**30, "cpu": 220 * 2**30, "disk": 2**40},
    },
}  # fmt: skip


class FakeServer(ThreadingHTTPServer):
    """The page, and whatever `answer` says at /status."""

    def __init__(self) -> None:
        self.answer: tuple[int, Any] = (200, EMPTY)
        self.keys: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Answering)

    def service_actions(self) -> None:
        time.sleep(0)


class Answering(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        status, body = self.server.answer
        if self.path == "/status":
            self.server.keys.append(self.headers.get("authorization"))
            if status == 0:  # the connection ends without a word
                return
            data, kind = json.dumps(body).encode(), "application/json"
        else:
            status, data, kind = 200, PAGE.read_bytes(), "text/html; charset=utf-8"
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def text(browser: Any, name: str) -> str:
    return browser.find_element("id", name).text


def shows(browser: Any, name: str, *words: str, seconds: float = 60.0) -> str:
    """Waits until all of the words are there; returns the whole text."""
    end = time.monotonic() + seconds
    while not all(word in (found := text(browser, name)) for word in words):
        assert time.monotonic() < end, (words, found)
        time.sleep(0.05)
    return found


def look(browser: Any, fake: FakeServer, status: int, body: Any, width: int = 1280, height: int = 1000) -> None:
    fake.answer = status, body
    browser.set_window_size(width, height)
    browser.get(f"http://127.0.0.1:{fake.server_port}/")


def no_complaints(browser: Any) -> None:
    """Nothing was fetched from elsewhere, and no script failed."""
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(browser.current_url) for name in loaded), loaded
    found = [entry for entry in browser.get_log("browser") if "Failed to load resource" not in entry["message"]]
    assert not found, found


@pytest.mark.parametrize(("width", "height"), [(1280, 1000), (390, 844)], ids=["desktop", "phone"])
def test_a_busy_server(browser: Any, fake: FakeServer, width: int, height: int, tmp_path: Path) -> None:
    look(browser, fake, 200, BUSY, width, height)
    shows(browser, "state", "live")
    figures = shows(browser, "figures", "1,834", "12,250", "760", "of 768 sequences, 12 aside", "4.2 s", "5,123 so far")
    assert "2\nrunning, 1 queued" in figures
    batches = text(browser, "batches")
    for word in (
        "<b>Summaries</b><script>", "412,465 of 1,000,000 lines (41.2 %)", "120 failed", "11 h 10 min left",
        "batch_1f033b2f759f661d9af5b769", "counting its lines", "queued", "cancelling", "50 of 200 lines (25.0 %)",
    ):  # fmt: skip
        assert word in batches, (word, batches)
    assert browser.title == "llama-3-70b · FlexBatch", "texts of clients are no HTML"
    limits = text(browser, "limits")
    assert limits.index("host to device ← limits") < limits.index("gpu compute") and "disk read" not in limits
    assert "4.1 s measured, 4 s planned" in limits and "1,910 tokens/s" in limits
    placement = text(browser, "placement")
    assert "20.5 % gpu, 79.5 % cpu" in placement and "200 GiB at most, of 220 GiB" in placement
    assert "up for 26 h 3 min" in text(browser, "footer")
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, f"{wide} pixels have to be scrolled to"
    no_complaints(browser)


def test_an_empty_server(browser: Any, fake: FakeServer) -> None:
    look(browser, fake, 200, EMPTY)
    shows(browser, "batches", "No batch is running or queued", "/v1/batches")
    assert "Not known yet" in text(browser, "limits") and "Nothing is placed yet" in text(browser, "placement")
    no_complaints(browser)


def test_a_server_that_fails_and_one_that_is_gone_and_comes_back(browser: Any, fake: FakeServer) -> None:
    look(browser, fake, 200, BUSY)
    shows(browser, "state", "live")
    fake.answer = 500, {"error": {"message": "the disk is full"}}
    shows(browser, "notice", "The server answers with an error: the disk is full. What is shown is")
    assert text(browser, "state") == "error 500" and "1,834" in text(browser, "figures"), "the last is still there"
    fake.answer = 0, None
    shows(browser, "notice", "The server does not answer; trying again. What is shown is")
    assert "stale" in browser.find_element("id", "content").get_attribute("class")
    fake.answer = 200, EMPTY
    shows(browser, "state", "live")
    assert not browser.find_element("id", "notice").is_displayed()


def test_a_server_with_keys(browser: Any, fake: FakeServer) -> None:
    look(browser, fake, 401, {"error": {"message": "no known key"}})
    shows(browser, "notice", "The server wants an API key.")
    assert not browser.find_element("id", "content").is_displayed()
    browser.find_element("id", "key").send_keys("wrong\n")
    shows(browser, "notice", "The server does not know this key.")
    assert fake.keys[-1] == "Bearer wrong"
    fake.answer = 200, BUSY
    browser.find_element("id", "key").send_keys("right\n")
    shows(browser, "state", "live")
    assert fake.keys[-1] == "Bearer right" and not browser.find_element("id", "login").is_displayed()
    browser.execute_script("sessionStorage.clear()")


def test_the_real_server_has_the_page(browser: Any, server: Server) -> None:
    browser.get(server.url)
    shows(browser, "state", "live")
    shows(browser, "model", "demo")
    shows(browser, "figures", "In the block")
    no_complaints(browser)
