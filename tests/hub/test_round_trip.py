"""A run is published on the Hub of server.py and loaded from it, by real commands in child processes.

The children only report; assertions are made here.
"""

import copy
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.loading import check_folder
from tests.arrays import save_images
from tests.hub.commands import ROOT, publish_all, run, run_code, start
from tests.hub.repositories import check_card
from tests.hub.server import TOKENS, Hub
from tests.models import quiet
from tests.short_run import SHORT_RUN, flags
from training.hub.files import HALF_WEIGHTS, IMAGES, MODEL_FILES, WEIGHTS, count_parameters

PUBLISHED = {*MODEL_FILES, *IMAGES, "README.md", "LICENSE", "config.yaml"}


def train_options(folder, name, **options):
    options = SHORT_RUN | {
        "train_data_dir": folder / "images",
        "cache_dir": folder / "cache",
        "output_dir": folder / name,
        "train_batch_size": 4,
        "save_images_steps": 0,
        "num_sample_images": 4,
        "ddpm_num_inference_steps": 4,
        **options,
    }
    return flags(options)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publishing")
    save_images(folder / "images", 10, 16, 16, 3)
    return folder


@pytest.fixture(scope="module")
def published(work):
    """A Hub with a run of train.py that published at step 3 and at the end: (hub, folder of the run, its output)."""
    with Hub(TOKENS) as hub:
        push = {"push_to_hub": True, "push_to_hub_steps": 3, "hub_model_id": "alice/images", "license": "cc0-1.0"}
        options = train_options(work, "run", hub_private_repo=True, **push)
        code, out, err = run(hub, work / "home", "train.py", *options)
        assert code == 0, err
        yield hub, work / "run", out + err


# ---- Publishing ------------------------------------------------------------------------------------------------------


def test_a_run_publishes_itself(published):
    hub, _, output = published
    repo = hub.repo("alice/images")
    commits = repo.commits[1:]
    titles = [commit.message.split(" (")[0] for commit in commits]
    assert titles == ["run, step 3", "run, step 6"], output
    for commit in commits:
        assert set(commit.files) - {".gitattributes"} == PUBLISHED and len(PUBLISHED) <= 20
    assert repo.private
    created = hub.requests_of("POST", "/api/repos/create")[0]
    assert created.time < min(request.time for request in hub.requests_of("POST", "/commit/"))
    assert set(repo.tags.values()) == {commit.sha for commit in commits}
    assert "Published" in output and "WARNING" not in output


def test_published_files_are_those_of_the_run(published):
    hub, folder, _ = published
    files = hub.repo("alice/images").head.files
    for name in (*MODEL_FILES, *IMAGES):
        assert files[name] == (folder / "pipeline" / name).read_bytes(), name
    assert files["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    config = yaml.safe_load(files["config.yaml"])
    assert config["train_data_dir"] == "images" and config["learning_rate"] == 1e-3
    assert not {"output_dir", "cache_dir", "hub_model_id", "push_to_hub"} & set(config)
    for name, content in files.items():
        for private in (str(folder.parent), "tok-a", str(Path.home()) + "/"):
            assert private.encode() not in content, (name, private)
    assert Image.open(io.BytesIO(files["samples.png"])).size[0] > 100


def test_the_card(published):
    hub, folder, _ = published
    repo = hub.repo("alice/images")
    card = repo.head.files["README.md"].decode()
    assert check_card(card) == ([], [])
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "cc0-1.0" and metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert "model-index" not in metadata and "datasets" not in metadata
    (tag,) = [name for name, sha in repo.tags.items() if sha == repo.head.sha]
    assert card.count(f'"alice/images", revision="{tag}"') == 3
    assert "$" not in card and "<!--" not in card and "None" not in card
    record = json.loads((folder / "pipeline" / "training.json").read_text())
    parameters = count_parameters(folder / "pipeline" / WEIGHTS)
    for text in (
        "Nothing was measured",
        "| optimizer steps | 6, with 4 images each |",
        "| images seen | 24 |",
        f"| parameters | {parameters:,} |",
        f"torch {record['versions']['torch']}",
        "10 images of folder images",
        "python training/train.py --config config.yaml --train_data_dir path/to/images",
        "![Grid of samples](samples.png)",
        "![Forward process and sampling trajectory](trajectory.png)",
    ):
        assert text in card, text


@pytest.fixture(scope="module")
def republished(published):
    """Commands of publish.py, one after the other in one process: exit code, output and errors of each, by name."""
    hub, folder, _ = published
    repo = hub.repo("alice/images")
    before = list(repo.commits), dict(repo.tags)
    hub.create("alice/tagged")
    commands = {
        "again": ("alice/images", "--license", "cc0-1.0"),
        "v1": ("tagged", "--revision_tag", "v1", "--fp16"),
        "v1 again": ("alice/tagged", "--revision_tag", "v1"),
        "v2": ("alice/tagged", "--revision_tag", "v2"),
    }
    arguments = [[str(folder), "--hub_model_id", *command] for command in commands.values()]
    results = publish_all(hub, folder.parent / "home", arguments)
    return dict(zip(commands, results)) | {"before": before}


def test_publishing_again_changes_nothing(published, republished):
    repo = published[0].repo("alice/images")
    code, out, err = republished["again"]
    assert code == 0 and (repo.commits, repo.tags) == republished["before"], err
    assert "Unchanged since it was published" in out


def test_a_tag_and_half_precision(published, republished):
    """The first publication has half-precision weights; the next one deletes them. A tag that exists is refused."""
    repo = published[0].repo("alice/tagged")
    assert [republished[name][0] for name in ("v1", "v1 again", "v2")] == [0, 3, 0], republished
    assert "already has the tag v1" in republished["v1 again"][2]
    assert "To publish it later" not in republished["v1 again"][2]  # the same command would be refused again
    _, first, second = repo.commits
    assert set(first.files) == PUBLISHED | {HALF_WEIGHTS, ".gitattributes"}
    assert "license: unknown" in first.files["README.md"].decode()
    assert set(second.files) == PUBLISHED | {".gitattributes"}
    assert repo.tags == {"v1": first.sha, "v2": second.sha}


def test_a_dry_run_sends_nothing(published, tmp_path):
    _, folder, _ = published
    with Hub({}) as hub:
        code, out, err = run(hub, tmp_path, "publish.py", folder, "--hub_model_id", "alice/x", "--dry_run", token=None)
        assert code == 0 and hub.requests == [], err
    size = (folder / "pipeline" / WEIGHTS).stat().st_size
    assert f"{size:,}  {WEIGHTS}" in out
    assert "# x" in out and "in 10 files, for alice/x with the tag sha256-" in out
    assert "remote code 0 of 255; the built-in classes " in out


# ---- Loading ---------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
sys.modules["ddpm_pipeline"] = None  # not importable
import diffusers, numpy as np, torch
from diffusers import DiffusionPipeline
diffusers.utils.logging.disable_progress_bar()
report = {}
trust = {"custom_pipeline": "pipeline", "trust_remote_code": True}

def sample(name, kind, repo="alice/images", **options):
    pipe = kind.from_pretrained(repo, **options)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
    np.save(f"{sys.argv[1]}/{name}.npy", images)
    report[name] = type(pipe).__module__
    return pipe

def package():
    del sys.modules["ddpm_pipeline"]
    from ddpm_pipeline import DDPMPipeline
    return DDPMPipeline
"""


def load(hub, home, folder, script, **variables):
    return run_code(hub, home, f"{LOAD}\n{script}\nprint(json.dumps(report))", folder, **variables)


def test_three_ways_to_load(published, tmp_path):
    """The built-in classes, remote code and the package, each also an older commit; then offline."""
    hub, _, _ = published
    repo = hub.repo("alice/images")
    old = next(name for name, sha in repo.tags.items() if sha == repo.commits[1].sha)
    without_package = f"""
sample("built-in", DiffusionPipeline)
sample("built-in, old", DiffusionPipeline, revision="{old}")
sample("remote", DiffusionPipeline, **trust)
sample("remote, old", DiffusionPipeline, revision="{old}", **trust)
"""
    with_package = f"""
DDPMPipeline = package()
sample("package", DDPMPipeline)
sample("package, old", DDPMPipeline, revision="{old}")
"""
    offline = 'sample("built-in, offline", DiffusionPipeline)\nsample("package, offline", package())'
    modules = load(hub, tmp_path / "home", tmp_path, without_package)
    modules |= load(hub, tmp_path / "home", tmp_path, with_package)
    before = len(hub.requests)
    modules |= load(hub, tmp_path / "home", tmp_path, offline, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    images = {name: np.load(tmp_path / f"{name}.npy") for name in modules}
    expected = {"built-in": "diffusers.pipelines", "remote": "diffusers_modules", "package": "ddpm_pipeline"}
    for name, module in modules.items():
        assert module.startswith(expected[name.split(",")[0]]), (name, module)
        reference = images["package, old" if "old" in name else "package"]
        assert np.abs(images[name] - reference).max() <= 1e-5, name
    assert np.abs(images["package"] - images["package, old"]).max() > 1e-3


def test_two_models_with_different_remote_code(published, tmp_path):
    hub, _, _ = published
    files = dict(hub.repo("alice/images").head.files)
    marked = files["pipeline.py"] + b"\n\nMARK = 'other'\n"
    hub.create("bob/other", files=files | {"pipeline.py": marked})
    script = """
first = sample("first", DiffusionPipeline, **trust)
other = sample("other", DiffusionPipeline, "bob/other", **trust)
report["marks"] = [type(pipe).trajectory.__globals__.get("MARK") for pipe in (first, other)]
first.save_pretrained(f"{sys.argv[1]}/saved")
report["saved"] = "MARK" in open(f"{sys.argv[1]}/saved/pipeline.py").read()
"""
    report = load(hub, tmp_path / "home", tmp_path, script)
    assert report["marks"] == [None, "other"] and not report["saved"]


def test_a_guide_on_the_hub(published, tmp_path):
    """diffusers downloads its weights with the model, but not its config.json, which is that of the network unless the
    guide is another one: then the package fetches it, and remote code says what is wrong."""
    hub, folder, _ = published
    pipe = DDPMPipeline.from_pretrained(folder / "pipeline")
    pipe.guide = copy.deepcopy(pipe.unet)
    torch.nn.init.constant_(pipe.guide.conv_out.bias, 0.5)
    pipe.save_pretrained(tmp_path / "same")
    layers = pipe.unet.config.layers_per_block + 1
    pipe.guide = UNet2DModel.from_config({**pipe.unet.config, "layers_per_block": layers})
    pipe.save_pretrained(tmp_path / "another")
    expected = {}
    for name in ("same", "another"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        contents = {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files}
        hub.create(f"bob/{name}", files=contents | {"README.md": b""})
        expected[name] = quiet(DDPMPipeline.from_pretrained(tmp_path / name))
    script = """
def guided(name, kind, repo, **options):
    pipe = kind.from_pretrained(repo, **options)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(seeds=[0, 1], num_inference_steps=3, output_type="np", autoguidance_scale=2.0).images
    np.save(f"{sys.argv[1]}/{name}.npy", images)
    report[name] = type(pipe).__module__

sample("built-in", DiffusionPipeline, "bob/same")
guided("remote same", DiffusionPipeline, "bob/same", **trust)
try:
    DiffusionPipeline.from_pretrained("bob/another", **trust)
except ValueError as error:
    report["error"] = str(error)
DDPMPipeline = package()
guided("package same", DDPMPipeline, "bob/same")
guided("package another", DDPMPipeline, "bob/another")
"""
    report = load(hub, tmp_path / "home", tmp_path, script)
    assert "guide/config.json is missing: load the model from a full copy" in report.pop("error")
    assert report.pop("built-in").startswith("diffusers.pipelines")
    assert list(report) == ["remote same", "package same", "package another"]
    options = {"seeds": [0, 1], "num_inference_steps": 3, "output_type": "np"}
    for name in report:
        pipe = expected[name.split()[1]]
        images = np.load(tmp_path / f"{name}.npy")
        assert np.abs(images - pipe(**options, autoguidance_scale=2.0).images).max() <= 1e-5, name
        assert np.abs(images - pipe(**options).images).max() > 1e-3, name


def test_training_from_a_published_model(published, work, tmp_path):
    """At a learning rate of nearly 0, the weights after one step are the published ones."""
    hub, folder, _ = published
    from safetensors.numpy import load_file

    options = train_options(
        work, "tuned", init_from="alice/images", denoiser="alice/images", max_train_steps=1, learning_rate=1e-12
    )
    code, out, err = run(hub, tmp_path, "train.py", *options)
    assert code == 0 and "initial weights: alice/images" in out, err
    weights = load_file(work / "tuned" / "checkpoint-000001" / "model.safetensors")
    expected = load_file(folder / "pipeline" / WEIGHTS)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=1e-7, rtol=0, err_msg=name)
    record = json.loads((work / "tuned" / "pipeline" / "training.json").read_text())
    assert record["config"]["init_from"] == "alice/images"


def test_a_network_that_is_not_on_the_hub_is_a_mistake(published, work, tmp_path):
    hub, _, _ = published
    code, _, err = run(hub, tmp_path, "train.py", *train_options(work, "none", denoiser="alice/nothing"))
    assert code == 2 and "denoiser is 'alice/nothing' (" in err and "give auto, tiny, small" in err, err


# ---- Failures --------------------------------------------------------------------------------------------------------

REFUSED = {  # token, repository, error before training
    "no token": (None, "alice/x", "no access token found"),
    "read only": ("tok-r", "alice/x", "403"),
    "another user": ("tok-b", "alice/x", "no write access to alice/x: the token belongs to bob"),
    "unknown token": ("wrong", "alice/x", "401"),
    "public": ("tok-a", "alice/public", "is public"),  # and hub_private_repo is set
}
TRAIN = """
import contextlib, io, json, os, sys
from tests.short_run import run_here

results = []
for token, options in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    err = io.StringIO()
    with contextlib.redirect_stdout(sys.stderr), contextlib.redirect_stderr(err):
        code = run_here("train.py", options)
    results.append([code, err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def refused(work):
    """Runs of train.py, one after the other in one process: exit code and errors by name, and all repositories."""
    with Hub(TOKENS) as hub:
        hub.create("alice/public")
        args = [
            (token, train_options(work, name, push_to_hub=True, hub_model_id=repo, hub_private_repo=name == "public"))
            for name, (token, repo, _) in REFUSED.items()
        ]
        results = run_code(hub, work / "home", TRAIN, json.dumps(args), token=None)
        return dict(zip(REFUSED, results)), hub.repos


@pytest.mark.parametrize("case", REFUSED)
def test_access_is_checked_before_training(refused, work, case):
    results, repos = refused
    code, err = results[case]
    assert code == 3 and REFUSED[case][2] in err and "Nothing was trained" in err, err
    assert not list((work / case).glob("checkpoint-*")) and "training:" not in err
    assert "Traceback" not in err and repos == ["alice/public"]


def test_training_survives_a_failing_hub(hub, work, tmp_path):
    """The Hub fails after the access check: the run is complete, and exits with 3 and a command that works later."""
    fault = hub.fault("GET", "/refs", status=403)
    options = train_options(work, "later", push_to_hub=True, push_to_hub_steps=4, hub_model_id="alice/later")
    code, _, err = run(hub, tmp_path, "train.py", *options)
    assert code == 3, err
    assert "WARNING: the model was not published" in err and "Training continues" in err
    assert "The run is unchanged. To publish it later:" in err
    assert check_folder(work / "later" / "pipeline") is True  # safetensors
    command = re.search(r"^ {4}python (.*)$", err, re.MULTILINE)[1]
    hub.end_fault(fault)
    environment = hub.environment(tmp_path, "tok-a")
    result = subprocess.run(f"{sys.executable} {command}", shell=True, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert set(hub.repo("alice/later").head.files) == PUBLISHED | {".gitattributes"}


def test_a_signal_during_the_upload(hub, work, tmp_path):
    """SIGTERM during the upload at the end: exit code 143 at once, and no process continues the upload."""
    options = train_options(work, "stopped", push_to_hub=True, hub_model_id="alice/stopped")
    hub.fault("GET", "/refs", silent=60)
    with start(hub, tmp_path, [ROOT / "training" / "train.py", *options]) as child:
        while not hub.requests_of("GET", "/refs"):
            assert child.poll() is None, child.communicate()
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert child.wait(20) == 143 and time.monotonic() - begin < 20
        child.communicate()
    processes = subprocess.run(["pgrep", "-f", f"{work}/stopped"], capture_output=True, text=True)
    assert processes.stdout == ""
    assert len(hub.repo("alice/stopped").commits) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--hub_model_id", "alice/x"), "nowhere"),
        (("{run}", "--hub_model_id", "alice/x/y"), "alice/x/y"),
        (("{run}",), "--hub_model_id"),
        (("{run}", "--hub_model_id", "alice/x", "--license", "mine"), "license is 'mine', which the Hub does not acc"),
        (("{run}", "--hub_model_id", "alice/x", "--revision_tag", "bad tag"), "revision_tag is 'bad tag'"),
        (("{run}", "--hub_model_id", "alice/x", "--hub_timeout", "0"), "hub_timeout is 0"),
        (("{run}", "--hub_model_id", "alice/x", "--no_such"), "--no_such"),
    ],
)
def test_mistakes_exit_with_2(published, hub, tmp_path, arguments, message):
    _, folder, _ = published
    code, _, err = run(hub, tmp_path, "publish.py", *(argument.format(run=folder) for argument in arguments))
    assert code == 2 and message in err and "Traceback" not in err, err
    assert all(len(hub.repo(name).commits) == 1 for name in hub.repos)


def test_publish_py_has_a_deadline(published, hub, tmp_path):
    _, folder, _ = published
    hub.fault("GET", "/whoami", silent=60)
    begin = time.monotonic()
    code, _, err = run(hub, tmp_path, "publish.py", folder, "--hub_model_id", "alice/x", "--hub_timeout", "1")
    assert code == 3 and time.monotonic() - begin < 40, err
    assert "no answer from the Hub within its 1 seconds" in err
    assert f"publish.py {folder} --hub_model_id alice/x --hub_timeout 1" in err


def test_remote_code_with_other_images_is_not_published(published, hub, tmp_path):
    """pipeline.py differs from the package. Nothing is created on the Hub for a run that cannot be published."""
    _, folder, _ = published
    shutil.copytree(folder, tmp_path / "run")
    file = tmp_path / "run" / "pipeline" / "pipeline.py"
    code = file.read_text()
    assert "x_t = output.prev_sample\n" in code
    file.write_text(code.replace("x_t = output.prev_sample\n", "x_t = output.prev_sample * 1.001\n"))
    code, _, err = run(hub, tmp_path, "publish.py", tmp_path / "run", "--hub_model_id", "alice/x")
    assert code == 1 and "Nothing was sent" in err and "alice/x" not in hub.repos, err


def test_nothing_is_created_for_a_run_that_is_incomplete(hub, tmp_path):
    (tmp_path / "run").mkdir()
    code, _, err = run(hub, tmp_path, "publish.py", tmp_path / "run", "--hub_model_id", "alice/x")
    assert code == 2 and "pipeline is missing" in err and "alice/x" not in hub.repos, err
