"""The start of a run: what its first step does not need is not imported before its end."""

import gc
import importlib
import json
import sys
from importlib.util import find_spec

import pytest
from PIL import Image

from ddpm_pipeline.cpu import importing
from tests.short_run import SHORT_RUN, TRAINING, flags, run_in_child

# What takes long to import, and what training needs later or never. (scipy.stats and torch._dynamo come with diffusers'
# U-net and torch's optimizers.)
NOT_YET = {
    "IPython", "datasets", "ddpm_pipeline.classifier", "ddpm_pipeline.fidelity", "ddpm_pipeline.moons",
    "ddpm_pipeline.pipeline_ddpm", "diffusers.pipelines.pipeline_utils", "jinja2", "matplotlib", "onnx",
    "onnxruntime", "onnxscript", "pandas", "peft", "pyarrow", "sklearn", "tensorboard", "tensorflow",
    "torch._inductor.compile_fx", "torch.utils.tensorboard", "torchvision", "training.evaluation",
    "training.hub.push", "transformers", "triton", "wandb",
}  # fmt: skip

# Runs the script; after the first step it writes the names of all modules, and whether garbage is searched, and ends.
FIRST_STEP = """
import gc, json, os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
def end(*_):
    sys.stdout.write("MODULES " + json.dumps([sorted(sys.modules), gc.isenabled()]) + "\\n")
    sys.stdout.flush()
    os._exit(0)
register_optimizer_step_post_hook(end)
runpy.run_path(sys.argv[1], run_name="__main__")
""".replace("sys.argv[1]", repr(str(TRAINING / "train.py")))


def test_the_first_step_comes_before_slow_imports(tmp_path):
    for i in range(4):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"{i}.png")
    options = SHORT_RUN | {"train_data_dir": tmp_path, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "run",
                           "train_batch_size": 2, "ddpm_num_inference_steps": 2, "tune": "off"}  # fmt: skip
    output = run_in_child(["-c", FIRST_STEP], None, flags(options))
    (line,) = [line for line in output.splitlines() if line.startswith("MODULES ")]
    modules, collects = json.loads(line.removeprefix("MODULES "))
    assert "diffusers.models.unets.unet_2d" in modules
    assert NOT_YET & set(modules) == set()
    assert collects


def test_transformers_is_as_if_not_installed_while_importing(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with importing():
        assert find_spec("transformers") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("transformers")
    assert "transformers" not in sys.modules
    monkeypatch.setitem(sys.modules, "transformers", sys)  # a program that has imported it keeps it
    with importing():
        assert importlib.import_module("transformers") is sys
    assert sys.modules["transformers"] is sys


def test_a_process_that_has_imported_diffusers_keeps_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", sys)
    with importing():
        assert "transformers" not in sys.modules


def test_garbage_is_searched_again_after_imports():
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), importing():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
