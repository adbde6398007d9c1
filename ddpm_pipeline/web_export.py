"""WEB EXPORT: a trained model as a folder with a static page, which samples in the browser of the visitor.

    index.html, *.js, style.css   the page, from ddpm_pipeline/web/
    page.json                     sizes, classes, and each sampler as a table: see `sampler_to_json`
    network.float32.onnx          computes in float32: WebAssembly, and WebGPU without half precision
    network.float16.onnx          computes in float16: WebGPU with half precision
    weights.bin                   the weights of both, float16
    onnxruntime/                  ONNX Runtime Web, from npm
    README.md                     makes the folder a static Space of the Hub

The networks are compared with torch's before the folder is there: see onnx_network.py.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from .calibrated import Guidance, Table, fitted_tables
from .decode import IMAGE_CHANNELS
from .files import replacing
from .images import check_image_size
from .labels import listed_class_names
from .onnx_network import write_networks
from .pixels import height_width
from .schedulers import set_schedule
from .scheduling_ddpm import DDPMScheduler
from .solver_tables import dpm_solver_table

NUM_INFERENCE_STEPS = 20  # of DDIM, by default: every step takes the visitor's time
MAX_WEIGHTS = 2e9  # bytes in float32: a tab has 4 GB for WebAssembly, and ONNX Runtime takes twice the weights
WRITTEN = {"page.json", "README.md", "weights.bin", "network.float32.onnx", "network.float16.onnx"}
LARGE_PAGE = 15e6  # bytes from which on the command says what a visitor loads

PAGE = Path(__file__).with_name("web")
PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # npm's
SCRIPT, WASM = "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"  # with WebGPU, and without

README = """---
title: {title}
emoji: \U0001f319
colorFrom: indigo
colorTo: gray
sdk: static
app_file: index.html
custom_headers:  # with them WebAssembly has several threads
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---
A diffusion model that draws images in your browser. Made by `python -m ddpm_pipeline export MODEL OUT --web`.
"""


def export_web(
    pipe: Any,
    folder: Path,
    *,
    title: str,
    num_inference_steps: int | None = None,
    onnxruntime_web: Path | None = None,
) -> dict[str, float]:
    """Write the page of a pipeline to a folder, which is replaced if it is such a page, and complete or not there.

    Args:
        pipe: a DDPMPipeline with our scheduler, in float32 on the CPU.
        title: of the page.
        num_inference_steps: of DDIM; by default 20, or all timesteps if there are fewer. The page also has the
            calibrated steps of the model.
        onnxruntime_web: folder of the unpacked npm package; by default `npm` fetches it.
    Returns:
        the relative error of each network, by its dtype. One in float16 that is not good enough is left out.
    Raises:
        ValueError: a model that the page cannot sample, a folder with other content, or no such npm package.
    """
    scheduler, unet = pipe.scheduler, pipe.unet
    check_model(unet, scheduler)
    check_folder_of_page(folder)
    samplers = make_samplers(pipe, num_inference_steps)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'{error}: the export needs the extra "web", pip install "ddpm-pipeline[web]"') from None
    with tempfile.TemporaryDirectory() as work, replacing(folder) as new:
        package = check_package(onnxruntime_web) if onnxruntime_web else fetch_package(Path(work))
        shutil.copytree(PAGE, new)
        write_runtime(package, new / "onnxruntime")
        errors = write_networks(unet, new)
        page = {
            "title": title,
            "channels": unet.config["in_channels"],
            "size": check_image_size(unet, None, None, None),
            "classes": listed_class_names(unet) or None,
            "bound": scheduler.config["clip_sample_range"] if scheduler.config["clip_sample"] else None,
            "networks": list(errors),
            "samplers": samplers,
        }
        (new / "page.json").write_text(json.dumps(page), encoding="utf-8")
        (new / "README.md").write_text(README.format(title=json.dumps(title, ensure_ascii=False)), encoding="utf-8")
    return errors


def check_model(unet: UNet2DModel, scheduler: Any) -> None:
    """Raise ValueError for a model that the page cannot sample."""
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"the scheduler is a {type(scheduler).__name__}: the page samples with our DDPMScheduler alone"
        )
    if scheduler.config["thresholding"]:
        raise ValueError("the scheduler has thresholding=True: the page clips, or does nothing; set it to False")
    if unet.config["in_channels"] not in IMAGE_CHANNELS:
        raise ValueError(f"the images have {unet.config['in_channels']} channels: the page shows 1, 3 or 4")
    if unet.config["sample_size"] is None:
        raise ValueError("the network has sample_size None: the page has images of one size, in unet/config.json")
    if unet.config["in_channels"] * math.prod(height_width(unet.config["sample_size"])) < 16:
        raise ValueError(f"the images have size {unet.config['sample_size']}: the page draws 16 numbers or more")
    size = 4 * sum(parameter.numel() for parameter in unet.parameters())
    if size > MAX_WEIGHTS:
        raise ValueError(
            f"the network has {size / 1e9:.1f} GB of weights in float32: a browser has room for {MAX_WEIGHTS / 1e9:.0f}"
        )
    if unet.config["class_embed_type"] is not None:
        raise ValueError(
            f"class_embed_type is {unet.config['class_embed_type']!r}: the page has numbered classes alone"
        )


def check_folder_of_page(folder: Path) -> None:
    """Raise ValueError for a folder with anything but a page that was exported before."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (folder.exists() and not folder.is_dir()) or (names and "page.json" not in names):
        raise ValueError(f"{folder} exists, and is no exported page: give a new folder")
    if others := sorted(names - {path.name for path in PAGE.iterdir()} - WRITTEN):  # as .git of a cloned Space
        raise ValueError(f"{folder} has {others[0]!r} beside the page, which would be deleted: give a new folder")
    if not folder.parent.is_dir():
        raise ValueError(f"{folder}: the folder {folder.parent} does not exist")


# ---- Samplers --------------------------------------------------------------------------------------------------------


def make_samplers(pipe: Any, num_inference_steps: int | None) -> list[dict[str, Any]]:
    """The calibrated samplers of the model without guidance, then DDIM, which adds no noise, for interpolation."""
    scheduler = pipe.scheduler
    tables, _ = fitted_tables(scheduler, pipe.unet, pipe.guide)
    schedule = set_schedule(scheduler, num_inference_steps, None, NUM_INFERENCE_STEPS)
    samplers = [("calibrated", table) for table in tables if table.guidance == Guidance()]
    samplers.append(("DDIM", dpm_solver_table(schedule, schedule.timesteps.tolist(), order=1)))
    return [sampler_to_json(name, table, scheduler) for name, table in samplers]


def sampler_to_json(name: str, table: Table, scheduler: DDPMScheduler) -> dict[str, Any]:
    """A table as steps: x_0_pred = clip(p_x x_t + p_out output), x_prev = c_x x_t + c_0 x_0_pred + ... + noise."""
    alpha_bar, _ = scheduler.alpha_bars(torch.tensor(table.network_timesteps))
    of_x_t, of_output = scheduler.x_0_coefficients(alpha_bar.double(), scheduler.prediction_type)
    noise = table.noise or (0.0,) * len(table.timesteps)
    steps = [
        {"t": t, "network_t": network_t, "prediction": [p_x, p_out], "coefficients": row, "noise": deviation}
        for t, network_t, p_x, p_out, row, deviation in zip(
            table.timesteps, table.network_timesteps, of_x_t.tolist(), of_output.tolist(), table.coefficients, noise
        )
    ]
    return {"name": name, "is_deterministic": not any(noise), "steps": steps}


# ---- ONNX Runtime Web ------------------------------------------------------------------------------------------------


def fetch_package(work: Path) -> Path:
    """The folder of the npm package, whose archive has the pinned hash. npm takes it from its cache if it is there."""
    hint = "give --onnxruntime_web FOLDER, the unpacked package, where npm or the network is missing"
    command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--prefer-offline", "--silent", "--pack-destination", str(work)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise ValueError(f"there is no npm to fetch {PACKAGE} {VERSION}: {hint}") from None
    except subprocess.SubprocessError as error:
        detail = str(getattr(error, "stderr", None) or error).strip()
        raise ValueError(f"npm cannot fetch {PACKAGE} {VERSION}: {hint}. npm says: {detail[-500:]}") from None
    archive = work / f"{PACKAGE}-{VERSION}.tgz"
    check_integrity(archive)
    # Python 3.11.3 and older have no filters; what is in the archive is known, as its hash is.
    options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(work, **options)
    return work / "package"


def check_integrity(archive: Path, expected: str = INTEGRITY) -> None:
    """Raise ValueError for an archive with another hash than the one that npm publishes."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != expected:
        raise ValueError(f"{archive.name} has the hash {found}, not {expected}: it is damaged, or another file")


def check_package(folder: Path) -> Path:
    """The folder of an unpacked npm package. ValueError: it is another one."""
    try:
        package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        found = f"{package['name']} {package['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        found = "no npm package"
    if found != f"{PACKAGE} {VERSION}":
        raise ValueError(f"--onnxruntime_web is {folder}, {found}: give the folder of {PACKAGE} {VERSION}, unpacked")
    return folder


def write_runtime(package: Path, folder: Path) -> None:
    """Its two files, one of them compressed: few servers compress WebAssembly, and it is 27 MB. With its licence."""
    folder.mkdir(exist_ok=True)
    shutil.copy(package / "dist" / SCRIPT, folder)
    data = (package / "dist" / WASM).read_bytes()
    (folder / f"{WASM}.gz").write_bytes(gzip.compress(data, 6, mtime=0))
