"""Run the code blocks of documentation pages, each page from top to bottom: `python tests/run_docs.py FOLDER PAGE ...`

The folder gets what the pages use: a run on the moons, a run on a folder of images, a small parquet data set. Runs are
short: some flags get other values (SHORT). HF_ENDPOINT is the URL of the Hub that "user/mine" is published to.
Writes FOLDER/results.json: for each page null, or what went wrong. A block after a comment `<!-- not run: REASON -->`
is left out.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

SHORT = {
    "train": f"--denoiser {ROOT}/tests/smallest_network.json --max_train_steps 2 --max_train_minutes 5 "
    "--train_batch_size 2 "
    "--gradient_accumulation_steps 1 --num_sample_images 2 --ddpm_num_inference_steps 2 --num_validation_images 2 "
    "--validation_steps 1 --checkpointing_steps 1 --mixed_precision no --cpu_threads 1 --lr_warmup_steps 1 "
    "--cache_dir cache",
    "evaluate": "--num_samples 16 --num_inference_steps 2 --num_bound_images 2 --num_flow_images 2 --num_reference 16 "
    "--batch_size 16 --strata 8 --cache_dir cache --cpu_threads 1",
    "calibrate": "--num_inference_steps 2 --num_images 16 --compare false --cache_dir cache --cpu_threads 1",
    # after two steps other lengths cannot be put together
    "choose_ema": "--ema 0.05,0.1 --num_samples 16 --num_inference_steps 2 --num_reference 16 --batch_size 16 "
    "--cache_dir cache --cpu_threads 1",
    "publish": "",
    "curve": "",
}
NEEDS_NETWORK = {("pip", "install"), ("hf", "auth"), ("git", "clone")}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of python and sh that are to be run."""
    fence = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(python|sh)\n(.*?)^```$", re.M | re.S)
    return [(language, text) for skip, language, text in fence.findall(page.read_text(encoding="utf-8")) if not skip]


def prepare(folder: Path) -> None:
    """Create what the pages use."""
    import datasets
    import numpy as np
    from PIL import Image

    from ddpm_pipeline import DDPMPipeline, DDPMScheduler, __main__, classifier, pipeline_ddpm
    from tests.models import tiny_unet
    from training.hub import push

    # These take long and are tested elsewhere: many sampling steps, a large batch, checking the same model twice.
    pipeline_ddpm.DEFAULT_STEPS = __main__.NUM_INFERENCE_STEPS = 5
    classifier.BATCH_SIZE = 4
    checked: dict[bytes, dict[str, float]] = {}
    check_loading = push.check_loading

    def check_once(folder: Path) -> dict[str, float]:
        weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        if weights not in checked:
            checked[weights] = check_loading(folder)
        return checked[weights]

    push.check_loading = check_once

    for name in ("training", "ddpm_pipeline", "benchmarks", "examples", "docs", "constraints.txt", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    images = [Image.fromarray(pixels) for pixels in random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)]
    for i, image in enumerate(images):
        path = folder / "my" / "images" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "my" / "more").symlink_to(folder / "my" / "images")
    digits = {"image": [image.convert("L").resize((28, 28)) for image in images], "label": [i % 10 for i in range(24)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (folder / "path" / "to" / "mnist").mkdir(parents=True)
    for split in ("train", "test"):
        datasets.Dataset.from_dict(digits, features).to_parquet(
            folder / f"path/to/mnist/{split}-00000-of-00001.parquet"
        )
    run_shell("python training/train.py --dataset_name moons --resolution 32 --output_dir runs/moons")
    run_shell("python training/train.py --train_data_dir my/images --resolution 32 --output_dir runs/mine")
    # the pages call this network thousands of times, so it is the smallest possible U-Net
    one_block = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe = DDPMPipeline(tiny_unet(size=32, **one_block), DDPMScheduler(timestep_spacing="trailing"))
    pipe.save_pretrained(folder / "runs" / "moons" / "pipeline")


def run_shell(text: str) -> None:
    """Run the commands of a block one by one."""
    for command in commands(text):
        words = shlex.split(command, comments=True)
        if not words or tuple(words[:2]) in NEEDS_NETWORK:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"make has no target {words[1]}"
        elif entry := entry_point(words):
            name, arguments = entry
            code = run_entry(name, shortened(arguments, shlex.split(SHORT[name])))
            assert code == 0, f"{command}: exit code {code}"
        elif words[:3] == ["python", "-m", "ddpm_pipeline"]:
            from ddpm_pipeline.__main__ import main

            with contextlib.suppress(SystemExit):  # of --help
                assert main(words[3:]) == 0, f"{command}: it failed"
        elif words[0] == "python" and words[1].endswith(".py"):
            run_script(words[1:])
        else:
            words = [sys.executable, *words[1:]] if words[0] == "python" else ["bash", "-c", command]
            subprocess.run(words, check=True)


def commands(text: str) -> list[str]:
    """The commands of a shell block: a line each, or several that a backslash or an open quotation joins."""
    joined, pending = [], ""
    for line in text.splitlines():
        pending += line.removesuffix("\\") + ("" if line.endswith("\\") else "\n")
        if line.endswith("\\"):
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        joined.append(pending)
        pending = ""
    return [*joined, pending] if pending.strip() else joined


def entry_point(words: list[str]) -> tuple[str, list[str]] | None:
    """(train, its arguments) of `accelerate launch training/train.py ...`, `python -m training.train ...` etc."""
    for i, word in enumerate(words):
        match = re.fullmatch(r"training/(\w+)\.py|training\.(\w+)", word)
        name = match and (match[1] or match[2])
        if name in SHORT:
            return name, words[i + 1 :]
    return None


def shortened(arguments: list[str], short: list[str]) -> list[str]:
    """The arguments, where the flags of `short` have the values given there."""
    kept = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument.partition("=")[0] not in short:
            kept.append(argument)
        elif "=" not in argument:
            pending.pop(0)  # its value
    return kept + short


def run_entry(name: str, arguments: list[str]) -> int:
    if name == "publish":  # it ends its process without waiting for threads
        from training.publish import main

        return main(arguments)
    from tests.short_run import run_here

    return run_here(f"{name}.py", arguments)


def run_script(words: list[str]) -> None:
    before, sys.argv = sys.argv, words
    code: object = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    assert not code, f"{shlex.join(words)}: exit code {code}"


def run_page(page: Path) -> str | None:
    """None, or the block that failed, with the traceback and what was printed."""
    namespace: dict[str, object] = {"__name__": "page"}
    printed = io.StringIO()
    for language, text in blocks(page):
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                if language == "sh":
                    run_shell(text)
                else:
                    exec(compile(text, f"a block of {page.name}", "exec"), namespace)
        except BaseException:
            return f"{text}\n{traceback.format_exc()}\n{printed.getvalue()[-3000:]}"
    return None


if __name__ == "__main__":
    folder, pages = Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]]
    os.chdir(folder)
    prepare(folder)
    results = {str(page): run_page(page) for page in pages}
    (folder / "results.json").write_text(json.dumps(results))
