"""The exported web page: the network as ONNX beside torch, the samplers beside the pipeline, the page in a browser."""

import base64
import contextlib
import functools
import json
import os
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ddpm_pipeline import DDPMScheduler, interpolation, onnx_network, web_export
from ddpm_pipeline.__main__ import main
from ddpm_pipeline.calibrated import Table, save_tables
from ddpm_pipeline.labels import record_class_names
from tests.models import tiny_pipe

onnx = pytest.importorskip("onnx", reason="needs the extra web")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra web")

NOISY = Table([19, 12, 4], [19, 11, 4], [[0.9, 0.2], [0.7, 0.5, -0.2], [0.1, 0.9, 0.2, -0.1]], noise=(0.3, 0.1, 0.0))
ONE_BLOCK = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
ATTENTION = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def small_pipe(**options):
    """With attention, clipping, 20 timesteps and a calibrated sampler of 3 steps that adds noise; images of 16 x 8."""
    pipe = tiny_pipe(3, size=(16, 8), **ATTENTION, attention_head_dim=2, **options)
    save_tables(pipe.scheduler, pipe.unet, [NOISY])
    return pipe


# ---- Without a browser -----------------------------------------------------------------------------------------------


# x_0 does not follow from a predicted noise where there is no signal
KINDS = [("epsilon", False), ("sample", False), ("sample", True), ("v_prediction", False), ("v_prediction", True)]


@pytest.mark.parametrize(("prediction_type", "rescale_betas_zero_snr"), KINDS)
def test_the_samplers_give_the_images_of_the_pipeline(prediction_type, rescale_betas_zero_snr):
    scheduler = DDPMScheduler(
        20,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=rescale_betas_zero_snr,
    )
    pipe = small_pipe(scheduler=scheduler)
    noise = torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(3))
    calls = [{"calibrated": True, "num_inference_steps": 3}, {"eta": 0.0, "num_inference_steps": 7}]
    for sampler, options in zip(web_export.make_samplers(pipe, 7), calls):
        generator = torch.Generator().manual_seed(5)
        expected = pipe(latents=noise, generator=generator, output_type="latent", **options).images
        generator = torch.Generator().manual_seed(5)
        x_t, predictions = noise, []
        for step in sampler["steps"]:  # the formula of `sampler_to_json`
            with torch.no_grad():
                output = pipe.unet(x_t, step["network_t"]).sample
            x_0_pred = (step["prediction"][0] * x_t + step["prediction"][1] * output).clamp(-1, 1)
            predictions = [x_0_pred, *predictions]
            x_t = sum(c * image for c, image in zip(step["coefficients"], [x_t, *predictions]))
            if step["noise"]:
                x_t = x_t + step["noise"] * torch.randn(x_t.shape, generator=generator)
        assert (x_t.clamp(-1, 1) - expected).abs().max() < 1e-4
    assert [sampler["is_deterministic"] for sampler in web_export.make_samplers(pipe, 7)] == [False, True]


@pytest.mark.parametrize(("model", "title"), [(".", "birds"), ("../birds", "birds"), ("pipeline", "birds")])
def test_the_title_is_the_name_of_the_folder(tmp_path, monkeypatch, model, title):
    (tmp_path / "birds" / "pipeline").mkdir(parents=True)
    tiny_pipe().save_pretrained(tmp_path / "birds")
    tiny_pipe().save_pretrained(tmp_path / "birds" / "pipeline")
    titles = []
    monkeypatch.setattr(web_export, "export_web", lambda pipe, folder, title, **options: titles.append(title) or {})
    monkeypatch.chdir(tmp_path / "birds")
    (tmp_path / "out").mkdir()
    assert main(["export", model, str(tmp_path / "out"), "--web"]) == 0
    assert titles == [title]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": DDPMScheduler(20, thresholding=True)}, "thresholding=True"),
        ({"channels": 2}, "2 channels"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"size": None}, "sample_size None"),
        ({"size": 2}, "size 2: the page draws 16 numbers or more"),
        ({"block_out_channels": (4, 8)}, r"has 0\.0 GB of weights in float32: a browser has room for 0"),
    ],
)
def test_a_model_that_the_page_cannot_sample_is_refused(tmp_path, options, message, monkeypatch):
    if "block_out_channels" in options:
        monkeypatch.setattr(web_export, "MAX_WEIGHTS", 20_000)
    with pytest.raises(ValueError, match=message):
        web_export.export_web(tiny_pipe(**options), tmp_path / "out", title="x")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no exported page"):
        web_export.check_folder_of_page(tmp_path)
    page = tmp_path / "page"
    shutil.copytree(web_export.PAGE, page)
    (page / "page.json").write_text("{}")
    web_export.check_folder_of_page(page)
    (page / ".git").mkdir()
    with pytest.raises(ValueError, match=r"has '\.git' beside the page, which would be deleted"):
        web_export.check_folder_of_page(page)
    with pytest.raises(ValueError, match="is no exported page"):
        web_export.check_folder_of_page(tmp_path / "thesis.txt")
    web_export.check_folder_of_page(tmp_path / "new")
    with pytest.raises(ValueError, match="does not exist"):
        web_export.check_folder_of_page(tmp_path / "no" / "new")


def test_the_package_is_checked(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"abc")
    # sha512 of "abc": FIPS 180-2, appendix C.1
    right = "sha512-3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw=="
    web_export.check_integrity(tmp_path / "a.tgz", right)
    with pytest.raises(ValueError, match="it is damaged"):
        web_export.check_integrity(tmp_path / "a.tgz")
    (tmp_path / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.0.0"}')
    with pytest.raises(ValueError, match=r"onnxruntime-web 1\.0\.0: give"):
        web_export.check_package(tmp_path)
    with pytest.raises(ValueError, match="no npm package"):
        web_export.check_package(tmp_path / "none")


NPM = {
    "not there": (None, r"there is no npm.*--onnxruntime_web FOLDER"),
    "no network": ("echo ENOTFOUND >&2; exit 1", r"npm cannot fetch.*--onnxruntime_web FOLDER.*ENOTFOUND"),
    "another file": (f'for to; do :; done; echo damaged > "$to/onnxruntime-web-{web_export.VERSION}.tgz"', "damaged"),
}


@pytest.mark.parametrize("state", NPM)
def test_without_the_package_the_command_ends_with_2(state, tmp_path, monkeypatch, capsys):
    script, message = NPM[state]
    tiny_pipe().save_pretrained(tmp_path / "model")
    (tmp_path / "bin").mkdir()
    if script:
        (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--web"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "model"]


# ---- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of onnxruntime-web."""
    given = os.environ.get("ONNXRUNTIME_WEB")
    try:
        return Path(given) if given else web_export.fetch_package(tmp_path_factory.mktemp("npm"))
    except ValueError as error:
        pytest.skip(f"needs onnxruntime-web, in $ONNXRUNTIME_WEB or from npm: {error}")


@pytest.fixture(scope="module")
def exported(package, tmp_path_factory):
    """(pipeline, folder, its network as onnx.ModelProto) of an exported model with classes and a learned variance."""
    folder = tmp_path_factory.mktemp("web")
    scheduler = DDPMScheduler(20, timestep_spacing="trailing", variance_type="learned_range")
    pipe = small_pipe(scheduler=scheduler, out_channels=6, num_class_embeds=3)
    record_class_names(pipe.unet, ["cat", "dog"])  # the third one is "no label"
    pipe.save_pretrained(folder / "model")
    command = ["export", str(folder / "model"), str(folder / "out"), "--web", "--num_inference_steps", "7"]
    models = []
    with pytest.MonkeyPatch.context() as patch:
        to_onnx = onnx_network.to_onnx
        patch.setattr(onnx_network, "to_onnx", lambda network: models.append(to_onnx(network)) or models[0])
        assert main([*command, "--onnxruntime_web", str(package)]) == 0
    return pipe, folder / "out", *models


@contextlib.contextmanager
def open_page(folder, browser, headers=()):
    """The page in the browser, and everything that its console and network reported."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def end_headers(self):
            for name, value in dict(headers).items():
                self.send_header(name, value)
            if self.path.endswith(".gz") and headers:
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

    handler = functools.partial(Handler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context(locale="en-US")
    page, reports = context.new_page(), []
    page.on("console", lambda message: reports.append(message.text))
    page.on("pageerror", lambda error: reports.append(str(error)))
    page.on("request", lambda request: reports.append(request.url) if str(server.server_port) not in request.url else 0)
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    wait(page)
    yield page, reports
    context.close()
    server.shutdown()


@pytest.fixture(scope="module")
def opened(exported, browser):
    with open_page(exported[1], browser) as opened:
        yield opened


def wait(page):
    page.wait_for_selector("body[data-state=ready], body[data-state=error]", timeout=120_000)
    assert page.locator("body").get_attribute("data-state") == "ready", page.inner_text("#status")


def pixels(page, canvas):
    """(H, W, 4) of a canvas."""
    script = "e => [e.width, e.height, ...e.getContext('2d').getImageData(0, 0, e.width, e.height).data]"
    width, height, *data = page.locator(canvas).first.evaluate(script)
    return np.array(data).reshape(height, width, 4)


def as_pixels(image):
    """Of x_0, (1, 3, H, W), in [-1, 1]."""
    return ((image[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()


def run_network(folder, name, pipe, t):
    """(output of a network, torch's prediction in float32), both (1, 3, 16, 8), of the class "dog"."""
    x_t, t = torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([t])
    session = onnxruntime.InferenceSession(folder / f"network.{name}.onnx", providers=["CPUExecutionProvider"])
    inputs = {"x_t": x_t.numpy(), "t": t.numpy(), "label": np.ones(1, np.int32)}
    with torch.no_grad():
        expected = pipe.unet(x_t, t, class_labels=torch.tensor([1])).sample[:, :3]
    return torch.from_numpy(session.run(None, inputs)[0]), expected


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_the_networks_are_torchs_also_between_timesteps(exported, name):
    """Embedding, products and weights: 11 bits of a float16 are 5e-4, and t = 987.3 alone would be off by 0.2."""
    pipe, folder, _ = exported
    for t in (0.0, 12.6, 987.3):
        output, expected = run_network(folder, name, pipe, t)
        assert (output - expected).norm() / expected.norm() < 1e-3
    graph = onnx.load(folder / f"network.{name}.onnx", load_external_data=False).graph
    dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in dtypes]
    assert products  # with weights that stayed in the graph: the others are stored in float16 for both
    assert {onnx.TensorProto.DataType.Name(dtypes[node.input[1]]) for node in products} == {
        {"float32": "FLOAT", "float16": "FLOAT16"}[name]
    }


def test_weights_that_float16_is_too_coarse_for_are_stored_in_float32(exported, tmp_path, monkeypatch):
    pipe, _, model = exported
    monkeypatch.setattr(onnx_network, "to_onnx", lambda network: model)
    monkeypatch.setattr(onnx_network, "MAX_ERROR", 2e-5)
    assert list(onnx_network.write_networks(pipe.unet, tmp_path)) == ["float32"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.float32.onnx", "weights.bin"]
    output, expected = run_network(tmp_path, "float32", pipe, 12.6)
    assert (output - expected).norm() / expected.norm() < 2e-5
    monkeypatch.setattr(onnx_network, "MAX_ERROR", 0.0)
    with pytest.raises(ValueError, match="differs from torch's by"):
        onnx_network.write_networks(pipe.unet, tmp_path)


def test_no_path_of_this_machine_is_in_the_page(exported):
    _, folder, _ = exported
    for name in ("float32", "float16"):
        content = (folder / f"network.{name}.onnx").read_bytes()
        assert b".py" not in content
    assert (folder / "network.float32.onnx").stat().st_size < 200_000  # the weights are beside it
    settings = json.loads((folder / "page.json").read_text())
    assert settings["networks"][0] == "float32"
    assert settings["classes"] == ["cat", "dog"]
    assert settings["size"] == [16, 8]


@pytest.mark.parametrize(("number", "options"), [(0, {"num_inference_steps": 3}), (1, {"eta": 0.0})])
def test_the_image_of_a_seed_is_that_of_python(exported, opened, number, options):
    """With and without noise in the steps: random numbers, network, sampler and pixels are the same."""
    pipe, (page, _) = exported[0], opened
    page.select_option("#class", "dog")
    page.select_option("#sampler", index=number)
    page.fill("#seed", "4000000007")
    page.press("#seed", "Enter")
    wait(page)
    options = {"num_inference_steps": 7, **options}
    expected = pipe(seeds=[4000000007], class_labels="dog", output_type="latent", **options).images
    found = pixels(page, "#image")
    assert expected.std() > 0.1
    assert (found[..., 3] == 255).all()
    assert np.abs(found[..., :3] - as_pixels(expected)).max() <= 2
    assert page.locator("#trajectory figure").count() == options["num_inference_steps"]
    first = torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(4000000007))
    assert np.abs(pixels(page, "#trajectory canvas")[..., :3] - as_pixels(first)).max() <= 1


def test_the_slider_goes_along_the_great_circle(exported, opened):
    pipe, (page, _) = exported[0], opened
    page.fill("#from", "1")
    page.fill("#to", "2")
    latents = [torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for weight in (0.0, 0.25, 1.0):
        page.locator("#weight").fill(str(weight))
        wait(page)
        latent = interpolation.spherical_mean(torch.stack(latents, 1), torch.tensor([[1 - weight, weight]]))
        expected = pipe(latents=latent, eta=0.0, num_inference_steps=7, class_labels="dog", output_type="latent").images
        assert np.abs(pixels(page, "#between")[..., :3] - as_pixels(expected)).max() <= 2


def test_the_page_speaks_chinese_and_fits_a_phone(opened):
    page, reports = opened
    page.click("#language")
    assert page.locator("html").get_attribute("lang") == "zh"
    assert page.inner_text("#generate-title") == "\u751f\u6210"
    page.click("#language")
    assert page.inner_text("#generate-title") == "Generate"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = page.evaluate("document.getElementById('image').toDataURL()")
    page.fill("#seed", "5")  # not drawn
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename.startswith("seed-4000000007-")
    assert Path(download.value.path()).read_bytes() == base64.b64decode(shown.partition(",")[2])
    of_the_test = "willReadFrequently"  # it reads the canvases again and again
    assert [report for report in reports if of_the_test not in report] == []  # and nothing from another host


def test_grey_images_of_a_model_of_2022(package, browser, tmp_path, capsys, caplog, recwarn):
    """One block, no attention, x_0 predicted; on a server that allows several threads and unzips what it sends."""
    pipe = tiny_pipe(scheduler=DDPMScheduler(20, prediction_type="sample"), block_out_channels=(4,), **ONE_BLOCK)
    pipe.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    old = json.loads(file.read_text()) | {"predict_epsilon": False, "timestep_values": None, "tensor_format": "pt"}
    file.write_text(json.dumps({name: value for name, value in old.items() if name != "prediction_type"}))
    command = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--web", "--title", "Moon: \u6708"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_export, "LARGE_PAGE", 1e6)
        assert main([*command, "--onnxruntime_web", str(package)]) == 0
    assert "a visitor loads" in capsys.readouterr().out
    assert "torchvision" not in caplog.text and not recwarn.list  # of what torch.onnx says of itself
    front_matter = yaml.safe_load((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front_matter["sdk"] == "static" and front_matter["title"] == "Moon: \u6708"
    with open_page(tmp_path / "out", browser, front_matter["custom_headers"]) as (page, reports):
        assert page.evaluate("self.crossOriginIsolated")
        assert page.locator("#class-label").is_hidden()
        assert page.inner_text("#title") == "Moon: \u6708"
        expected = pipe(seeds=[0], eta=0.0, num_inference_steps=20, output_type="latent").images
        found = pixels(page, "#image")
        assert expected.std() > 0.1
        assert np.abs(found - as_pixels(torch.cat([expected.expand(1, 3, 8, 8), torch.ones(1, 1, 8, 8)], 1))).max() <= 2
        assert reports == []
