"""The three ways to load a saved folder, each in its own process, and the content of the folder.

The child processes only report what they observe; the expectations are here. An import of diffusers takes seconds, so
one child observes many things.
"""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.utils.dynamic_modules_utils import get_relative_imports

import ddpm_pipeline
from ddpm_pipeline import DDPMPipeline, DDPMScheduler, pipeline_ddpm, saving
from ddpm_pipeline.calibrated import Table, save_tables
from tests.models import tiny_unet

SCHEDULERS = {
    "plain": {"num_train_timesteps": 6},
    "su": {"num_train_timesteps": 8, "beta_schedule": "su", "timestep_spacing": "trailing", "clip_sample": False},
    "calibrated": {"num_train_timesteps": 6},
}
TABLE = Table([5, 3, 1], [4, 3, 1], [[0.5, 0.5], [0.5, 0.6, -0.1], [0.1, 1.0, -0.1, 0.05]])
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

# The start of every child. `use` loads in some way and reports classes, warnings and log messages, schedule and images.
BEGIN = """
import importlib.abc, json, logging, sys, warnings
folder, work, package = sys.argv[1:]

class HidePackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_pipeline":
            raise ModuleNotFoundError(name)

if package:
    sys.path.insert(0, package)
else:
    sys.meta_path.insert(0, HidePackage())

import diffusers, numpy as np, torch
from diffusers import DiffusionPipeline
diffusers.utils.logging.disable_progress_bar()

class Record(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())

logging.getLogger("diffusers").addHandler(Record())
report = {}

def name_of(thing):
    return type(thing).__module__ + "." + type(thing).__name__

def use(name, load, save_as=None, **options):
    global messages
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 6, "output_type": "np", **options}
        images = pipe(2, torch.Generator().manual_seed(0), **options).images
    np.save(f"{work}/{name}.npy", images)
    report[name] = {
        "pipe": name_of(pipe), "unet": name_of(pipe.unet), "scheduler": name_of(pipe.scheduler),
        "messages": messages + [str(warning.message) for warning in caught],
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
import pickle
loaded = []
trust = {"custom_pipeline": "pipeline", "trust_remote_code": True}
for name in ("plain", "su", "calibrated"):
    path = f"{folder}/{name}"
    use(f"{name} built-in", lambda: DiffusionPipeline.from_pretrained(path), save_as=f"{name} saved by built-in")
    pipe = use(f"{name} remote", lambda: DiffusionPipeline.from_pretrained(path, **trust), save_as=f"{name} 1")
    use(f"{name} again", lambda: DiffusionPipeline.from_pretrained(f"{work}/{name} 1", **trust), save_as=f"{name} 2")
    steps = list(pipe.trajectory(seeds=[1, 2]))
    report[f"{name} remote"] |= {
        "timesteps seen": [step.t for step in steps],
        "same images": torch.equal(steps[-1].x_0_pred, pipe(seeds=[1, 2], output_type="latent").images),
    }
    loaded.append(pipe)
try:
    pipe.fuse(np.zeros((8, 8, 3)), np.ones((8, 8, 3)), distance="features.pt")
except ValueError as error:
    report["distance"] = str(error)
use("3 steps", lambda: pipe, num_inference_steps=3, calibrated=True)
report["pickled"] = [type(pickle.loads(pickle.dumps(pipe.scheduler))) is type(pipe.scheduler) for pipe in loaded]
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
for name in ("plain", "su", "calibrated"):
    path = f"{folder}/{name}"
    use(name, lambda: ddpm_pipeline.DDPMPipeline.from_pretrained(path), save_as=f"{name} 3")
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
    """Two saved pipelines."""
    folder = tmp_path_factory.mktemp("saved")
    for name, options in SCHEDULERS.items():
        unet, scheduler = tiny_unet(channels=3), DDPMScheduler(**options)
        if name == "calibrated":
            save_tables(scheduler, unet, [TABLE])
        DDPMPipeline(unet, scheduler).save_pretrained(folder / name)
    return folder


class Child:
    """A fresh process, its report, and the folders and images that it writes."""

    def __init__(self, script, folder, work, package):
        self.work = work
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "hf"),
            "HF_MODULES_CACHE": str(work / "modules"),
        }
        # package: the folder where the child finds ddpm_pipeline; "" hides it
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
    """The two child processes, running at the same time."""
    package_folder = str(Path(pipeline_ddpm.__file__).parents[1])
    return [
        Child(script, folder, tmp_path_factory.mktemp("child"), package)
        for script, package in ((WITHOUT_PACKAGE, ""), (WITH_PACKAGE, package_folder))
    ]


@pytest.fixture(scope="module")
def bare(children):
    return children[0].wait()


@pytest.fixture(scope="module")
def packaged(children):
    return children[1].wait()


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---- The three ways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers_alone_loads_its_own_classes_without_a_warning(name, bare):
    assert bare.report["package"] == []
    assert bare.classes(f"{name} built-in") == BUILT_IN
    assert bare.report[f"{name} built-in"]["messages"] == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_package_loads_its_own_classes(name, packaged):
    for way in (name, f"{name} again"):
        assert packaged.classes(way) == OURS
        assert packaged.report[way]["messages"] == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_remote_code_loads_our_classes_without_the_package(name, bare):
    for way in (f"{name} remote", f"{name} again"):
        names = {part: re.sub(r"_[0-9a-f]{16}\.", ".", name) for part, name in bare.classes(way).items()}
        assert names == REMOTE  # each version has its own module: tests/hub loads two versions in one process
        assert bare.report[way]["messages"] == []
    assert bare.report["pickled"] == [True, True, True]
    assert bare.report["distance"].startswith("distance is 'features.pt', but this pipeline is remote code")
    num_steps = SCHEDULERS[name]["num_train_timesteps"]
    assert bare.report[f"{name} remote"]["timesteps seen"] == list(range(num_steps))[::-1]
    assert bare.report[f"{name} remote"]["same images"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_three_ways_give_the_same_images_and_schedule(name, folder, bare, packaged):
    local = DDPMPipeline.from_pretrained(folder / name)
    local.set_progress_bar_config(disable=True)
    expected = local(2, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
    assert expected.std() > 0.1
    ways = [(bare, way) for way in (f"{name} built-in", f"{name} remote", f"{name} again")]
    ways += [(packaged, way) for way in (name, f"{name} again")]
    for child, way in ways:
        np.testing.assert_allclose(child.images(way), expected, rtol=0, atol=1e-5)
        seen = child.report[way]
        np.testing.assert_allclose(seen["betas"], DDPMScheduler(**SCHEDULERS[name]).betas, rtol=1e-6)
        assert seen["timesteps"] == local.scheduler.timesteps.tolist()
        assert seen["spacing"] == SCHEDULERS[name].get("timestep_spacing", "leading")
        assert seen["unet"] == "diffusers.models.unets.unet_2d.UNet2DModel"
    if name == "su":
        assert local.scheduler.timesteps.tolist() == [7, 6, 4, 3, 2, 0]  # trailing, which rounds half to even
        np.testing.assert_allclose(seen["betas"], 0.02 * np.arange(1, 9) / 8, rtol=1e-7)  # float32


def test_remote_code_takes_calibrated_steps(folder, bare):
    local = DDPMPipeline.from_pretrained(folder / "calibrated")
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "np"}
    expected = local(2, **options, calibrated=True).images
    np.testing.assert_allclose(bare.images("3 steps"), expected, rtol=0, atol=1e-5)
    assert bare.report["3 steps"]["timesteps"] == TABLE.timesteps
    assert bare.report["3 steps"]["messages"] == []


def test_register_replaces_the_classes_of_diffusers_until_unregister(packaged):
    assert packaged.report["lazy"] == []  # importing the package does not import diffusers' pipelines
    assert packaged.classes("import alone") == BUILT_IN
    for way in ("registered", "registered twice"):
        assert packaged.classes(way) == OURS
        assert packaged.report[way]["names"] == [True, True]
    assert packaged.classes("by name") == OURS
    assert packaged.classes("unregistered") == BUILT_IN
    assert packaged.report["unregistered"]["names"]
    for way in ("import alone", "registered", "registered twice", "by name", "unregistered"):
        assert packaged.report[way]["messages"] == []
        np.testing.assert_allclose(packaged.images(way), packaged.images("plain"), rtol=0, atol=1e-5)


# ---- The folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_three_ways_save_the_same_bytes(name, folder, bare, packaged, tmp_path):
    expected = contents(folder / name)
    assert sorted(expected) == [
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for child, copies in ((bare, (1, 2)), (packaged, (3, 4))):
        for copy in copies:
            assert contents(child.work / f"{name} {copy}") == expected, copy
    # from a folder that the built-in classes saved, and over an existing folder
    again = DDPMPipeline.from_pretrained(bare.work / f"{name} saved by built-in")
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == expected
    again.save_pretrained(str(folder / name))
    assert contents(folder / name) == expected
    if name == "plain":
        assert contents(packaged.work / "registered") == expected


def test_class_names_are_the_built_in_ones(folder):
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


def test_no_file_contains_a_local_path(folder, bare):
    again = DDPMPipeline.from_pretrained(folder / "plain")
    assert str(folder) in str(again.unet.config._name_or_path)  # which could end up in a file
    for saved in (folder, bare.work / "plain 2"):
        for name, data in contents(saved).items():
            for path in (folder.parent, Path(__file__).parents[1], Path.home(), Path(sys.prefix)):
                assert str(path).encode() + b"/" not in data, (name, path)
            assert b"_name_or_path" not in data or name.endswith(".py")


def test_the_remote_code_is_one_file_with_one_pipeline(folder):
    """diffusers finds relative imports by regular expression, and the pipeline as the only subclass in the file."""
    text = (folder / "plain" / "pipeline.py").read_text()
    assert get_relative_imports(folder / "plain" / "pipeline.py") == []
    assert re.findall(r"^\s*(?:from|import)\s+\.", text, re.MULTILINE) == []
    assert re.findall(r"^class (\w+)\([\w, ]*Pipeline\w*\)", text, re.MULTILINE) == ["DDPMPipeline"]
    assert re.findall(r"^class (\w+)\(\w*Scheduler\w*\)", text, re.MULTILINE) == ["DDPMScheduler"]
    assert "ddpm_pipeline" not in re.sub(r"pipeline_ddpm|ddpm\.pipeline", "", text).replace("scheduling_ddpm", "")
    for name in saving.BUNDLED:
        source = Path(pipeline_ddpm.__file__).with_name(f"{name}.py").read_text()
        lines = [line for line in source.splitlines() if not line.startswith("from .")]  # relative imports
        assert "\n".join(lines) in text, name


def test_the_class_name_follows_the_scheduler(folder, tmp_path):
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


def test_save_pretrained_accepts_the_arguments_of_diffusers(folder, tmp_path):
    pipe = DDPMPipeline.from_pretrained(folder / "plain")
    pipe.save_pretrained(tmp_path / "positional", True, "ema")  # safe_serialization, variant
    assert (tmp_path / "positional" / "unet" / "diffusion_pytorch_model.ema.safetensors").is_file()
    assert (tmp_path / "positional" / "pipeline.py").is_file()
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin").is_file()
    half = DDPMPipeline.from_pretrained(tmp_path / "positional", variant="ema", dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16


def test_the_public_names_of_the_package():
    with pytest.raises(AttributeError, match="'DDIMPipeline'"):
        ddpm_pipeline.DDIMPipeline  # noqa: B018
    assert set(ddpm_pipeline.__all__) == {"DDPMPipeline", "DDPMScheduler", "register", "unregister"}
    assert set(dir(ddpm_pipeline)) == {*ddpm_pipeline.__all__, "__version__"}
    for name in dir(ddpm_pipeline):
        assert getattr(ddpm_pipeline, name)


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    assert parser.read(Path(ddpm_pipeline.__file__).parents[1] / "setup.cfg")
    return parser


def test_the_docstring_of_the_package_lists_every_module():
    files = {path.name for path in Path(ddpm_pipeline.__file__).parent.glob("*.py")} - {"__init__.py"}
    listed = re.findall(r"^    (\w+\.py) ", ddpm_pipeline.__doc__, re.MULTILINE)
    assert sorted(listed) == sorted(files)


def test_the_version_is_in_one_place(setup_cfg):
    """setup.cfg reads the literal from the source: an import would need torch where a wheel is built."""
    assert setup_cfg["metadata"]["version"] == "attr: ddpm_pipeline.__version__"
    tree = ast.parse(Path(ddpm_pipeline.__file__).read_text())
    literals = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert literals["__version__"] == ddpm_pipeline.__version__


def test_the_package_is_typed(setup_cfg):
    assert (Path(ddpm_pipeline.__file__).parent / "py.typed").is_file()
    assert "py.typed" in setup_cfg["options.package_data"]["ddpm_pipeline"].split(", ")
