"""The page in headless Chromium, as visitors use it. Screenshots go to the folder SCREENSHOTS, if that is set.

SCREENSHOTS=/tmp pytest -n 0 --slow tests/app/test_browser.py
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_command import address_of, start

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")]
pytest.importorskip("gradio", reason="the page needs the extra app")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by the package playwright")
PATIENCE = 180_000
"""Milliseconds: without a GPU the canvas to paint on is slow."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def served(folder: Path, *flags: str) -> Iterator[str]:
    process = start(folder, "--port", "0", *flags)
    try:
        yield address_of(process)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert errors == "diffusers-infogain: terminated\n"
    finally:
        process.kill()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Iterator[str]:
    yield from served(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Iterator[str]:
    yield from served(tmp_path_factory.mktemp("texts"), "--model", "demo-text")


class Visit:
    """A visitor's page, which notes where it sends requests."""

    def __init__(self, browser: Any, address: str, width: int = 1280):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = address
        self.page.goto(address)

    def press(self, name: str) -> None:
        """Presses the button of this name on the tab that is shown."""
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def field(self, label: str) -> Any:
        """The field of this label on the tab that is shown."""
        beginning = re.compile(rf"^\s*{re.escape(label)}\b")  # what the field is for may follow
        return self.page.get_by_label(beginning).and_(self.page.locator("input, textarea")).locator("visible=true")

    def figures(self) -> Any:
        """The line or the table of figures on the tab that is shown, once it is there."""
        found = self.page.get_by_text("(NFE)").locator("visible=true").first
        found.wait_for()
        return found

    def leave(self, name: str) -> None:
        """Takes a picture, and checks that nothing was wider than the page and asked of another server."""
        self.page.wait_for_timeout(1500)
        if "SCREENSHOTS" in os.environ:
            self.page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{name}.png", full_page=True)
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        hosts = {urlsplit(url).netloc for url in self.requests if url.startswith("http")}
        assert hosts == {urlsplit(self.address).netloc}
        self.page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_generate(browser, images, width):
    visit = Visit(browser, images, width)
    assert visit.field("Prompt").input_value()  # there is something to try at once
    visit.press("Generate")
    assert "model rows (NFE) in" in visit.figures().inner_text()
    picture = visit.page.locator(".ig-gallery img").locator("visible=true").first
    assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [64, 64]
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert picture.bounding_box()["width"] > 250
    strip = visit.page.locator(".ig-strip img").locator("visible=true")
    assert strip.count() >= 3
    assert all(strip.nth(i).get_attribute("alt") for i in range(strip.count()))
    visit.page.locator(".ig-plot").locator("visible=true").wait_for()
    visit.leave(f"generate-{width}")


@pytest.mark.parametrize("width", [1280, 390])
def test_compare(browser, images, width):
    visit = Visit(browser, images, width)
    visit.page.get_by_role("tab", name="Compare").click()
    visit.press("Compare")
    visit.figures()
    heads = visit.page.locator(".ig-figures th[scope=col]").locator("visible=true").all_inner_texts()
    assert heads == ["default (preset)", "maskgit"]
    assert visit.page.locator(".ig-gallery img").locator("visible=true").count() == 2
    visit.leave(f"compare-{width}")


def test_paint_over_a_part(browser, images):
    visit = Visit(browser, images)
    visit.press("Generate")
    visit.press("Edit this picture")
    canvas = visit.page.locator("canvas").locator("visible=true").first
    canvas.wait_for()
    visit.page.wait_for_timeout(2000)
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visit.page.mouse.move(middle[0] - 80, middle[1] - 60)
    visit.page.mouse.down()
    for x, y in ((-20, -20), (40, -60)):
        visit.page.mouse.move(middle[0] + x, middle[1] + y)
    visit.page.mouse.up()
    visit.field("Prompt").fill("a red square above a purple circle")
    visit.press("Edit")
    assert "model row" in visit.figures().inner_text()
    decoded = visit.page.locator(".ig-strip figcaption").locator("visible=true").last.inner_text()
    assert 0 < int(decoded.split()[-2]) < 40  # tokens: the painted ones
    visit.leave("edit-1280")


def test_a_wrong_entry_is_a_message(browser, images):
    visit = Visit(browser, images, 390)
    visit.page.get_by_role("button", name="Settings of this sampler").first.click()
    visit.field("Token temperature").fill("warm")
    visit.press("Generate")
    visit.page.get_by_text("“Token temperature” must be one number or two (start end), got 'warm'.").wait_for()
    assert visit.page.get_by_text("Traceback").count() == 0
    visit.page.wait_for_timeout(500)
    visit.field("Token temperature").fill("1")
    visit.press("Generate")  # can be pressed again
    visit.figures()
    visit.leave("message-390")


def test_settings_follow_the_sampler(browser, images):
    visit = Visit(browser, images)
    visit.page.get_by_role("button", name="Settings of this sampler").first.click()
    assert visit.field("Choice temperature").count() == 0
    visit.field("Sampler").click()
    visit.page.get_by_role("option", name="maskgit", exact=True).click()
    visit.field("Choice temperature").wait_for()
    assert visit.field("Choice temperature").input_value() == "2 0"
    assert visit.page.get_by_label("number input for Candidates", exact=True).locator("visible=true").count() == 0
    visit.leave("settings-1280")


def test_stop(browser, images):
    visit = Visit(browser, images)
    visit.page.get_by_role("button", name="Settings of this sampler").first.click()
    visit.field("Sampler").click()
    visit.page.get_by_role("option", name="paper (preset)", exact=True).click()
    visit.page.get_by_label("number input for Steps", exact=True).locator("visible=true").fill("60")
    visit.page.get_by_label("number input for Pictures", exact=True).locator("visible=true").fill("8")
    visit.press("Generate")
    visit.press("Stop")  # waits until it can be pressed
    visit.page.get_by_text("topped").locator("visible=true").first.wait_for()
    visit.leave("stopped-1280")


@pytest.mark.parametrize("width", [1280, 390])
def test_write(browser, texts, width):
    visit = Visit(browser, texts, width)
    visit.press("Write")
    visit.figures()
    text = visit.page.locator("textarea:disabled").locator("visible=true").first.input_value()
    assert text.startswith("S12")
    assert "_" not in text
    visit.leave(f"write-{width}")
