"""The page of the demo in Chromium, as on a phone in Chinese, loaded once: each tab to its image and download."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.models import tiny_pipe

pytest.importorskip("gradio", reason="needs gradio, of the extra demo")

from ddpm_pipeline.demo.jobs import Model
from ddpm_pipeline.demo.page import serving
from ddpm_pipeline.demo.texts import TEXTS

TEXT = TEXTS["zh"]
PATIENCE = 120_000  # milliseconds; a busy machine takes 20 seconds for the page alone


@pytest.fixture(scope="module")
def opened(browser):
    """The page, and what its console and network reported that they should not."""
    context = browser.new_context(locale="zh-CN", viewport={"width": 390, "height": 844}, color_scheme="dark")
    page, reports = context.new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: reports.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: reports.append(str(error)))
    with serving(Model(tiny_pipe(), "user/model")) as served:
        own = (served.local_url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else reports.append(request.url))
        page.goto(served.local_url, wait_until="domcontentloaded")
        yield page, reports
        context.close()


@pytest.fixture
def gray(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "gray.png")
    return tmp_path / "gray.png"


def open_tab(page, name):
    """The contents of a tab."""
    page.get_by_role("tab", name=TEXT[name], exact=True).click()
    return page.locator(f"#demo-{name}")


def click(tab, name):
    tab.get_by_role("button", name=TEXT[name], exact=True).click()


def upload(tab, file):
    tab.locator("input[type=file]").set_input_files(file)
    tab.locator(".demo-upload img").wait_for()


def download(page, link):
    with page.expect_download() as downloaded:
        link.click()
    with open(downloaded.value.path(), "rb") as file:
        return Image.open(io.BytesIO(file.read()))


def test_generate(opened):
    page, _ = opened
    tab = open_tab(page, "generate")
    tab.get_by_role("spinbutton", name=TEXT["seed"]).fill("41")
    click(tab, "run_generate")
    image = download(page, tab.locator(".demo-results a").nth(1))
    settings = json.loads(image.text["settings"])
    assert (image.text["seed"], settings["seed"], settings["num_inference_steps"]) == ("42", 42, 20)
    assert np.array_equal(image, tiny_pipe()(seeds=[42], num_inference_steps=20).images[0])
    assert tab.locator(".demo-results img").count() == 4


def test_interpolate(opened):
    page, _ = opened
    tab = open_tab(page, "interpolate")
    for i in range(2):
        tab.get_by_role("button", name=TEXT["draw"]).nth(i).click()
        tab.locator(".demo-upload img").nth(i).wait_for()
    click(tab, "run_interpolate")
    slider, label = tab.locator(".demo-viewer input"), tab.locator(".demo-viewer output")
    before = label.inner_text()
    place = "document.querySelector('#demo-interpolate .demo-frame:not([hidden]) img').getBoundingClientRect()"
    page.wait_for_function(f"{place}.bottom <= innerHeight")  # on a phone it was below the settings
    slider.press("ArrowRight")
    assert label.inner_text() != before and tab.locator(".demo-frame:visible").count() == 1
    assert json.loads(download(page, tab.locator(".demo-frame:visible a").first).text["settings"])["weight"] == 0.625
    assert download(page, tab.locator(".demo-frame:visible a[download$=gif]")).is_animated


def test_repair(opened, gray):
    page, _ = opened
    tab = open_tab(page, "repair")
    upload(tab, gray)
    canvas = tab.locator("#demo-mask")
    drawn = "document.getElementById('demo-mask').getContext('2d').getImageData(7, 7, 1, 1).data[3] > 0"
    page.wait_for_function(drawn)  # an image that comes later would clear the mask
    canvas.click(position={"x": 5, "y": 5})
    painted = page.evaluate("ddpmDemo.mask()").count("1")
    canvas.press("ArrowRight")
    canvas.press("Space")
    assert 0 < painted < page.evaluate("ddpmDemo.mask()").count("1") < 32
    click(tab, "run_repair")
    repaired = np.asarray(download(page, tab.locator(".demo-results a").first))
    assert repaired[7, 7] == 100 != repaired[0, 0]


def test_trajectory(opened, gray):
    page, _ = opened
    tab = open_tab(page, "trajectory")
    upload(tab, gray)
    click(tab, "run_trajectory")
    slider = tab.locator(".demo-viewer input")
    slider.press("Home")
    first = download(page, tab.locator(".demo-frame:visible a").first)
    assert tab.locator(".demo-frame").count() == 40 and json.loads(first.text["settings"])["t"] == 0
    assert np.abs(np.asarray(first, int) - 100).max() < 100  # one step of noise


def test_the_page_fits_phones_and_screens_and_reports_nothing(opened):
    """After the other tests: no message of the console, no request to another host."""
    page, reports = opened
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        for name in ("generate", "interpolate", "repair", "trajectory"):
            open_tab(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    assert reports == []
