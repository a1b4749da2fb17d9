"""The page in headless Chromium, over the real app and the batcher.

QDIT_SCREENSHOTS=DIR writes what it looks like.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import CARD, PATIENCE, Running, Switches, eventually, fake_model, running_server

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH")
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}

Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens a page and fails the test for what its console complains about."""
    complaints: list[str] = []
    contexts = []

    def open_it(url: str, viewport: dict[str, int] = DESK, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: complaints.append(said.text) if said.type == "error" else None,
        )
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    expected = re.compile("status of (401|429|500)")  # the browser's own lines about answers
    assert [line for line in complaints if not expected.search(line)] == []


@pytest.fixture
def two_models(switches: Switches) -> Iterator[Running]:
    models = [fake_model(switches), fake_model(Switches(), "full")]
    with running_server(models) as running:
        yield running
        switches.gate.set()


def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("QDIT_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def ready(page: Page) -> None:
    page.wait_for_selector("#fields:not([disabled])")


def source_of(page: Page, selector: str = ".images a img") -> str:
    return str(page.locator(selector).first.get_attribute("src"))


def test_an_image_is_the_apis_own(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page(server.url)
    ready(page)
    page.select_option("#class", label="cat (1)")
    page.fill("#steps-number", "7")
    page.fill("#seed", "5")
    page.click("#make")
    page.wait_for_selector(".images a img")
    body = {"prompt": "cat", "num_inference_steps": 7, "seed": 5}
    made = httpx.post(f"{server.url}/v1/images/generations", json=body).json()
    assert source_of(page) == f"data:image/png;base64,{made['data'][0]['b64_json']}"
    assert page.locator(".card h2").inner_text() == "cat"
    page.locator("#said", has_text="cat is done").wait_for(state="attached")
    assert page.locator("#health").get_attribute("data-state") == "ready"


def test_progress_previews_and_cancelling(
    open_page: Callable[..., Page], server: Running, switches: Switches
) -> None:
    switches.seconds = 0.02
    page = open_page(server.url)
    ready(page)
    page.fill("#steps-number", "200")
    page.click("#make")
    page.wait_for_selector(".images img.preview")
    assert 0 < float(page.locator("progress").evaluate("bar => bar.value")) < 1
    assert re.match(r"step \d+ of 200, about \d+ s left", page.locator(".told").inner_text())
    picture(page, "progress")
    page.click(".cancel")
    page.wait_for_selector(".told.failed >> text=cancelled")
    eventually(lambda: server.images() == 0, patience=3)


def test_by_keyboard_alone(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page(server.url)
    ready(page)
    assert page.evaluate("document.activeElement.id") == "class"
    page.keyboard.type("crane, m")
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
        if seen[-1] == "make":
            break
    assert seen[-1] == "make"
    assert {"steps", "guidance-number", "seed", "new-seed", "count", "scheduler"} <= set(seen)
    page.keyboard.press("Enter")
    page.wait_for_selector(".images a img")
    assert page.locator(".card h2").inner_text() == "crane, machine"


def test_side_by_side_from_the_same_noise(
    open_page: Callable[..., Page], two_models: Running
) -> None:
    page = open_page(two_models.url)
    ready(page)
    assert page.input_value("#model") == "*"
    page.fill("#count", "3")
    page.click("#make")
    page.wait_for_selector(".between:not([hidden])")
    assert page.locator(".column").count() == 2
    assert page.locator(".images a img").count() == 6
    assert page.locator(".between").inner_text().endswith("equal, equal, equal")
    picture(page, "side-by-side")


def test_psnr_is_numpys(open_page: Callable[..., Page], server: Running) -> None:
    """Of two different images of the API, against the same figure from their pixels."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    files = [
        httpx.post(
            f"{server.url}/v1/images/generations", json={"prompt": "cat", "seed": seed}
        ).json()["data"][0]["b64_json"]
        for seed in (1, 2)
    ]
    arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(f))), float) for f in files]
    expected = 10 * np.log10(255**2 / np.mean((arrays[0] - arrays[1]) ** 2))
    page = open_page(server.url)
    script = """async (files) => {
        const { psnrOf } = await import("./psnr.js");
        return psnrOf(...files.map((file) => Object.assign(new Image(), {
            src: `data:image/png;base64,${file}` })));
    }"""
    assert page.evaluate(script, files) == pytest.approx(expected, rel=1e-9)


def test_settings_come_back(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page(server.url)
    ready(page)
    page.fill("#seed", "77")
    page.fill("#guidance-number", "3.5")
    page.click("#make")
    page.wait_for_selector(".images a img")
    first = source_of(page)
    page.fill("#guidance-number", "1")
    page.click("#new-seed")
    assert page.input_value("#seed") != "77"
    page.click(".again")
    assert page.input_value("#seed") == "77"
    assert page.input_value("#guidance-number") == "3.5"
    page.keyboard.press("Enter")
    page.locator(".images a img").nth(1).wait_for()
    assert source_of(page) == first


def test_a_failure_is_told(
    open_page: Callable[..., Page], server: Running, switches: Switches
) -> None:
    switches.failures = 1
    page = open_page(server.url)
    ready(page)
    page.click("#make")
    page.wait_for_selector(".told.failed >> text=device lost")


def test_a_full_queue_is_asked_again(open_page: Callable[..., Page], switches: Switches) -> None:
    with running_server([fake_model(switches)], max_queue=1) as running:
        switches.gate.clear()
        body = {"prompt": "cat"}
        holding = threading.Thread(
            target=lambda: httpx.post(
                f"{running.url}/v1/images/generations", json=body, timeout=PATIENCE
            )
        )
        holding.start()
        eventually(lambda: running.images() == 1)
        page = open_page(running.url)
        ready(page)
        page.click("#make")
        page.wait_for_selector(".told >> text=the queue is full")
        switches.gate.set()
        page.wait_for_selector(".images a img")
        holding.join(PATIENCE)


def test_a_key_is_asked_for(open_page: Callable[..., Page], switches: Switches) -> None:
    key = "a key of enough characters"
    with running_server([fake_model(switches)], keys=(key,)) as running:
        page = open_page(running.url)
        page.wait_for_selector("#key-field:not([hidden])")
        picture(page, "key")
        page.fill("#key", "another one, and wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server refuses this key.")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#class:visible")
        ready(page)
        page.click("#make")
        page.wait_for_selector(".images a img")
        assert not page.locator("#key").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page: Callable[..., Page], two_models: Running, scheme: str) -> None:
    page = open_page(two_models.url, PHONE, color_scheme=scheme, has_touch=True)
    ready(page)
    page.tap("#make")
    page.wait_for_selector(".between:not([hidden])")
    picture(page, f"phone-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = """[...document.querySelectorAll("button, select, input")].filter((one) => {
        const box = one.getBoundingClientRect();
        return box.height > 0 && (box.height < 40 || box.right > innerWidth || box.left < 0);
    }).map((one) => one.id || one.className)"""
    assert page.evaluate(small) == []


def test_every_field_has_a_name(open_page: Callable[..., Page], server: Running) -> None:
    """As a screen reader would say it."""
    page = open_page(server.url)
    ready(page)
    nameless = """[...document.querySelectorAll("input, select, button")].filter((one) =>
        !(one.labels?.length || one.ariaLabel || one.textContent.trim())).map((one) => one.id)"""
    assert page.evaluate(nameless) == []
    assert page.get_by_label("Steps", exact=True).get_attribute("id") == "steps"
    assert page.get_by_role("button", name="Make it").is_enabled()


def test_nothing_comes_from_elsewhere(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    ready(page)
    assert len(asked) >= 5
    assert {url for url in asked if not url.startswith((server.url, "data:"))} == set()


def test_class_names_are_text(open_page: Callable[..., Page], switches: Switches) -> None:
    from dataclasses import replace

    evil = "<img src=x onerror=document.title='owned'>"
    model = fake_model(switches)
    names = (evil, *CARD.class_names[1:])
    model = replace(model, card=replace(model.card, class_names=names))
    with running_server([model]) as running:
        page = open_page(running.url)
        ready(page)
        page.click("#make")
        page.wait_for_selector(".images a img")
        assert page.locator(".card h2").inner_text() == evil
        assert page.title() == "qdit-serve"
