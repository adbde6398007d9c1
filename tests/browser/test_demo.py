"""The page of the demo in Chromium: each tab to its image and download, without console errors or other hosts."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.demo.jobs import Model
from ddpm_pipeline.demo.texts import TEXTS
from tests.models import tiny_pipe

pytest.importorskip("gradio", reason="needs gradio, of the extra demo")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def address():
    from ddpm_pipeline.demo.page import serve

    page = serve(Model(tiny_pipe(), "user/model"), port=0, block=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[("en-US", 1280, "light"), ("zh-CN", 390, "dark")], ids=lambda param: param[0])
def visit(request, chromium, address):
    """(page, its texts), in one of the languages, on a wide or a narrow screen."""
    locale, width, scheme = request.param
    context = chromium.new_context(locale=locale, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    errors, others = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    own = (address, "data:", "blob:")
    page.on("request", lambda sent: None if sent.url.startswith(own) else others.append(sent.url))
    page.goto(address)
    yield page, TEXTS["zh" if locale == "zh-CN" else "en"]
    assert not errors and not others
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def downloaded(page, link):
    with page.expect_download() as download:
        link.click()
    with open(download.value.path(), "rb") as file:
        return Image.open(io.BytesIO(file.read()))


def test_each_tab_gives_images_that_can_be_downloaded(visit, tmp_path):
    page, texts = visit
    shown = page.locator("[role=tabpanel]:visible")
    upload = tmp_path / "gray.png"
    Image.new("L", (8, 8), 100).save(upload)

    page.get_by_role("button", name=texts["run_generate"]).click()
    image = downloaded(page, shown.locator(".demo-results a").nth(1))
    arguments = json.loads(image.text["settings"])
    seed, steps = arguments["seed"], arguments["num_inference_steps"]
    assert np.array_equal(image, tiny_pipe()(seeds=[seed], num_inference_steps=steps).images[0])

    page.get_by_role("tab", name=texts["interpolate"]).click()
    for i in range(2):
        shown.get_by_role("button", name=texts["draw"]).nth(i).click()
        shown.locator(".demo-upload img").nth(i).wait_for()
    page.get_by_role("button", name=texts["run_interpolate"]).click()
    slider, label = shown.locator(".demo-viewer input"), shown.locator(".demo-viewer output")
    before = label.inner_text()
    slider.press("ArrowRight")
    assert label.inner_text() != before and shown.locator(".demo-frame:visible").count() == 1
    assert downloaded(page, shown.locator("a[download$=gif]")).is_animated

    page.get_by_role("tab", name=texts["repair"]).click()
    shown.locator("input[type=file]").set_input_files(upload)
    shown.locator(".demo-upload img").wait_for()
    canvas = page.locator("#demo-mask")
    is_there = "document.getElementById('demo-mask').getContext('2d').getImageData(7, 7, 1, 1).data[3] > 0"
    page.wait_for_function(is_there)  # an image that comes later would clear the mask
    canvas.click(position={"x": 5, "y": 5})
    canvas.press("ArrowRight")
    canvas.press("Space")
    assert page.evaluate("ddpmDemo.mask()").count("1") >= 2
    page.get_by_role("button", name=texts["run_repair"]).click()
    repaired = np.asarray(downloaded(page, shown.locator(".demo-results a").first))
    assert repaired[7, 7] == 100 != repaired[0, 0]

    page.get_by_role("tab", name=texts["trajectory"]).click()
    shown.locator("input[type=file]").set_input_files(upload)
    shown.locator(".demo-upload img").wait_for()
    page.get_by_role("button", name=texts["run_trajectory"]).click()
    shown.locator(".demo-viewer").wait_for()
    assert shown.locator(".demo-frame").count() == 40
