"""The three ways to load a saved folder, each in a process of its own, and what is in the folder.

The children only report what they see; what is expected stands here. An import of diffusers takes seconds, so that one
child looks at many things.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.utils.dynamic_modules_utils import get_relative_imports

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, pipeline_ddpm

SCHEDULERS = {
    "plain": {"num_train_timesteps": 6},
    "su": {"num_train_timesteps": 8, "beta_schedule": "su", "timestep_spacing": "trailing", "clip_sample": False},
}
BUILT_IN = {
    "pipe": "diffusers.pipelines.ddpm.pipeline_ddpm.DDPMPipeline",
    "scheduler": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
}
OURS = {
    "pipe": "ddpm_pipeline.pipeline_ddpm.DDPMPipeline",
    "scheduler": "ddpm_pipeline.scheduling_ddpm.DDPMScheduler",
}
REMOTE = {
    "pipe": "diffusers_modules.local.pipeline.DDPMPipeline",
    "scheduler": "diffusers_modules.local.pipeline.DDPMScheduler",
}

# What every child begins with. `use` loads in some way and reports the classes, what was said, the schedule and images.
BEGIN = """
import importlib.abc, json, logging, sys, warnings
folder, work, package = sys.argv[1:]

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_pipeline":
            raise ModuleNotFoundError(name)

if package:
    sys.path.insert(0, package)
else:
    sys.meta_path.insert(0, Hide())

import diffusers, numpy as np, torch
from diffusers import DiffusionPipeline
diffusers.utils.logging.disable_progress_bar()

class Say(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.getLogger("diffusers").addHandler(Say())
report = {}

def name_of(thing):
    return type(thing).__module__ + "." + type(thing).__name__

def use(name, load, save_as=None, **options):
    global said
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np", **options).images
    np.save(f"{work}/{name}.npy", images)
    report[name] = {
        "pipe": name_of(pipe), "unet": name_of(pipe.unet), "scheduler": name_of(pipe.scheduler),
        "said": said + [str(warning.message) for warning in caught],
        "betas": pipe.scheduler.betas.tolist(), "timesteps": pipe.scheduler.timesteps.tolist(),
        "spacing": pipe.scheduler.config.timestep_spacing,
    }
    if save_as:
        pipe.save_pretrained(f"{work}/{save_as}")
    return pipe
"""

WITHOUT_PACKAGE = (
    BEGIN
    + """
trust = {"custom_pipeline": "pipeline", "trust_remote_code": True}
for name in ("plain", "su"):
    where = f"{folder}/{name}"
    use(f"{name} as anyone", lambda: DiffusionPipeline.from_pretrained(where), save_as=f"{name} built-in")
    pipe = use(f"{name} remote", lambda: DiffusionPipeline.from_pretrained(where, **trust), save_as=f"{name} 1")
    use(f"{name} again", lambda: DiffusionPipeline.from_pretrained(f"{work}/{name} 1", **trust), save_as=f"{name} 2")
    steps = list(pipe.trajectory(seeds=[1, 2]))
    report[f"{name} remote"] |= {
        "walk": [step.t for step in steps],
        "arrived": torch.equal(steps[-1].x_0_pred, pipe(seeds=[1, 2], output_type="latent").images),
    }
report["package"] = [name for name in sys.modules if name.startswith("ddpm_pipeline")]
json.dump(report, open(f"{work}/report.json", "w"))
"""
)

WITH_PACKAGE = (
    BEGIN
    + """
before = DiffusionPipeline, diffusers.DDPMPipeline, diffusers.DDPMScheduler
import ddpm_pipeline
report["lazy"] = [name for name in sys.modules if name.startswith("ddpm_pipeline.")]
plain = lambda: DiffusionPipeline.from_pretrained(f"{folder}/plain")
for name in ("plain", "su"):
    where = f"{folder}/{name}"
    use(name, lambda: ddpm_pipeline.DDPMPipeline.from_pretrained(where), save_as=f"{name} 3")
    use(f"{name} again", lambda: ddpm_pipeline.DDPMPipeline.from_pretrained(f"{work}/{name} 3"), save_as=f"{name} 4")
use("import alone", plain)
ddpm_pipeline.register()
for name in ("registered", "registered twice"):
    use(name, plain, save_as=name)
    report[name]["names"] = [
        diffusers.DDPMPipeline is ddpm_pipeline.DDPMPipeline, diffusers.DDPMScheduler is ddpm_pipeline.DDPMScheduler
    ]
    ddpm_pipeline.register()
use("by name", lambda: diffusers.DDPMPipeline(pipe.unet, diffusers.DDPMScheduler(6)) if (pipe := plain()) else None)
ddpm_pipeline.unregister()
use("unregistered", plain)
after = DiffusionPipeline, diffusers.DDPMPipeline, diffusers.DDPMScheduler
ddpm_pipeline.unregister()
twice = DiffusionPipeline, diffusers.DDPMPipeline, diffusers.DDPMScheduler
report["unregistered"]["names"] = before == after == twice
json.dump(report, open(f"{work}/report.json", "w"))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pipelines, saved from where they were made."""
    folder = tmp_path_factory.mktemp("saved")
    for name, options in SCHEDULERS.items():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        DDPMPipeline(unet, DDPMScheduler(**options)).save_pretrained(folder / name)
    return folder


class Child:
    """A fresh process, its report, and the folders and images that it leaves."""

    def __init__(self, script, folder, work, package):
        self.work = work
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "hf"),
            "HF_MODULES_CACHE": str(work / "modules"),
        }
        # package is where the child finds ours; with "" it finds none
        command = [sys.executable, "-I", "-c", script, str(folder), str(work), package]
        self.process = subprocess.Popen(command, cwd=work, env=environment, stderr=subprocess.PIPE, text=True)

    def wait(self):
        _, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, errors
        self.report = json.loads((self.work / "report.json").read_text())
        return self

    def images(self, name):
        return np.load(self.work / f"{name}.npy")

    def classes(self, name):
        return {key: self.report[name][key] for key in ("pipe", "scheduler")}


@pytest.fixture(scope="module")
def children(folder, tmp_path_factory):
    """Both at the same time."""
    where = str(Path(pipeline_ddpm.__file__).parents[1])
    return [
        Child(script, folder, tmp_path_factory.mktemp("child"), package)
        for script, package in ((WITHOUT_PACKAGE, ""), (WITH_PACKAGE, where))
    ]


@pytest.fixture(scope="module")
def without_package(children):
    return children[0].wait()


@pytest.fixture(scope="module")
def with_package(children):
    return children[1].wait()


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---- The three ways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_anyone_gets_the_built_in_classes_and_no_warning(name, without_package):
    assert without_package.report["package"] == []
    assert without_package.classes(f"{name} as anyone") == BUILT_IN
    assert without_package.report[f"{name} as anyone"]["said"] == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_the_package_it_is_ours(name, with_package):
    for way in (name, f"{name} again"):
        assert with_package.classes(way) == OURS
        assert with_package.report[way]["said"] == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_the_package_it_is_ours_as_remote_code(name, without_package):
    for way in (f"{name} remote", f"{name} again"):
        names = {part: re.sub(r"_[0-9a-f]{16}\.", ".", name) for part, name in without_package.classes(way).items()}
        assert names == REMOTE  # in a module of this version's own: tests/hub has two versions in one process
        assert without_package.report[way]["said"] == []
    num_steps = SCHEDULERS[name]["num_train_timesteps"]
    assert without_package.report[f"{name} remote"]["walk"] == list(range(num_steps))[::-1]
    assert without_package.report[f"{name} remote"]["arrived"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_same_images_and_the_same_schedule_every_way(name, folder, without_package, with_package):
    here = DDPMPipeline.from_pretrained(folder / name)
    here.set_progress_bar_config(disable=True)
    expected = here(2, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
    assert expected.std() > 0.1
    ways = [(without_package, way) for way in (f"{name} as anyone", f"{name} remote", f"{name} again")]
    ways += [(with_package, way) for way in (name, f"{name} again")]
    for child, way in ways:
        np.testing.assert_allclose(child.images(way), expected, rtol=0, atol=1e-5)
        seen = child.report[way]
        np.testing.assert_allclose(seen["betas"], DDPMScheduler(**SCHEDULERS[name]).betas, rtol=1e-6)
        assert seen["timesteps"] == here.scheduler.timesteps.tolist()
        assert seen["spacing"] == SCHEDULERS[name].get("timestep_spacing", "leading")
        assert seen["unet"] == "diffusers.models.unets.unet_2d.UNet2DModel"
    if name == "su":
        assert here.scheduler.timesteps.tolist() == [7, 6, 4, 3, 2, 0]  # trailing, which rounds half to even
        np.testing.assert_allclose(seen["betas"], 0.02 * np.arange(1, 9) / 8, rtol=1e-12)


def test_register_is_for_the_plain_line_and_can_be_taken_back(with_package):
    assert with_package.report["lazy"] == []  # the package's name costs no import of diffusers' pipelines
    assert with_package.classes("import alone") == BUILT_IN
    for way in ("registered", "registered twice"):
        assert with_package.classes(way) == OURS
        assert with_package.report[way]["names"] == [True, True]
    assert with_package.classes("by name") == OURS
    assert with_package.classes("unregistered") == BUILT_IN
    assert with_package.report["unregistered"]["names"]
    for way in ("import alone", "registered", "registered twice", "by name", "unregistered"):
        assert with_package.report[way]["said"] == []
        np.testing.assert_allclose(with_package.images(way), with_package.images("plain"), rtol=0, atol=1e-5)


# ---- The folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_from_anywhere_it_is_the_same_to_the_byte(name, folder, without_package, with_package, tmp_path):
    expected = contents(folder / name)
    assert sorted(expected) == [
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for child, copies in ((without_package, (1, 2)), (with_package, (3, 4))):
        for copy in copies:
            assert contents(child.work / f"{name} {copy}") == expected, copy
    # from what the built-in classes saved, and over what is there
    again = DDPMPipeline.from_pretrained(without_package.work / f"{name} built-in")
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == expected
    again.save_pretrained(str(folder / name))
    assert contents(folder / name) == expected
    if name == "plain":
        assert contents(with_package.work / "registered") == expected


def test_the_labels_are_the_built_in_ones(folder):
    for name in SCHEDULERS:
        index = json.loads((folder / name / "model_index.json").read_text())
        assert index.pop("_diffusers_version")
        assert index == {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        assert (
            json.loads((folder / name / "scheduler/scheduler_config.json").read_text())["_class_name"]
            == "DDPMScheduler"
        )
        assert json.loads((folder / name / "unet/config.json").read_text())["_class_name"] == "UNet2DModel"


def test_no_path_of_this_machine_is_in_a_file(folder, without_package):
    again = DDPMPipeline.from_pretrained(folder / "plain")
    assert str(folder) in str(again.unet.config._name_or_path)  # from where it would come into a file
    for place in (folder, without_package.work / "plain 2"):
        for name, data in contents(place).items():
            for path in (folder.parent, Path(__file__).parents[1], Path.home(), Path(sys.prefix)):
                assert str(path).encode() + b"/" not in data, (name, path)
            assert b"_name_or_path" not in data or name.endswith(".py")


def test_the_remote_code_is_one_file_with_one_pipeline(folder):
    """diffusers finds the relative imports by regular expression, and the pipeline as the one subclass in the file."""
    text = (folder / "plain" / "pipeline.py").read_text()
    assert get_relative_imports(folder / "plain" / "pipeline.py") == []
    assert re.findall(r"^\s*(?:from|import)\s+\.", text, re.MULTILINE) == []
    assert re.findall(r"^class (\w+)\([\w, ]*Pipeline\w*\)", text, re.MULTILINE) == ["DDPMPipeline"]
    assert re.findall(r"^class (\w+)\(\w*Scheduler\w*\)", text, re.MULTILINE) == ["DDPMScheduler"]
    assert "ddpm_pipeline" not in re.sub(r"pipeline_ddpm|ddpm\.pipeline", "", text).replace("scheduling_ddpm", "")
    here = Path(pipeline_ddpm.__file__)
    for module in (
        here,
        *map(here.with_name, ("scheduling_ddpm.py", "images.py", "fusion.py")),
    ):  # all but the one import
        lines = [line for line in module.read_text().splitlines() if not line.startswith("from .")]
        assert "\n".join(lines) in text


def test_the_label_follows_the_scheduler(folder, tmp_path):
    pipe = DDPMPipeline.from_pretrained(folder / "su")
    for i, (scheduler, label) in enumerate(
        [
            (DDPMScheduler(7), "DDPMScheduler"),
            (BuiltInDDPMScheduler(7), "DDPMScheduler"),
            (DDIMScheduler(7), "DDIMScheduler"),
            (DDPMScheduler(7), "DDPMScheduler"),
        ]
    ):
        pipe.scheduler = scheduler
        assert pipe.config.scheduler == ("diffusers", label)
        pipe.save_pretrained(tmp_path / str(i))
        index = json.loads((tmp_path / str(i) / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", label]
        ours = DDPMPipeline.from_pretrained(tmp_path / str(i)).scheduler
        theirs = BuiltInDDPMPipeline.from_pretrained(tmp_path / str(i)).scheduler
        assert type(ours) is (DDPMScheduler if label == "DDPMScheduler" else DDIMScheduler)
        assert type(theirs) is (BuiltInDDPMScheduler if label == "DDPMScheduler" else DDIMScheduler)
        assert ours.config.num_train_timesteps == theirs.config.num_train_timesteps == 7


def test_saving_takes_what_diffusers_takes(folder, tmp_path):
    pipe = DDPMPipeline.from_pretrained(folder / "plain")
    pipe.save_pretrained(tmp_path / "positional", True, "ema")  # safe_serialization, variant
    assert (tmp_path / "positional" / "unet" / "diffusion_pytorch_model.ema.safetensors").is_file()
    assert (tmp_path / "positional" / "pipeline.py").is_file()
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin").is_file()
    half = DDPMPipeline.from_pretrained(tmp_path / "positional", variant="ema", dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16


def test_another_name_in_the_package_is_an_error():
    import ddpm_pipeline

    with pytest.raises(AttributeError, match="'DDIMPipeline'"):
        ddpm_pipeline.DDIMPipeline  # noqa: B018
    assert set(ddpm_pipeline.__all__) == {"DDPMPipeline", "DDPMScheduler", "register", "unregister"}
