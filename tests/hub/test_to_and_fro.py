"""A run goes to the Hub of server.py and comes back: by real commands, in processes of their own.

The children only report what they see; what is expected stands here.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from server import Hub, check_card

from ddpm_pipeline.loading import check_folder
from tests.short_run import SHORT_RUN
from training.hub import stage

ROOT = Path(__file__).parents[2]
MODEL = {
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
ALL = MODEL | {"README.md", "LICENSE", "config.yaml", "samples.png", "walk.png"}


def start(hub, home, script, *arguments, token="tok-a", **variables):
    environment = hub.environment(home, token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, str(ROOT / "training" / script), *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def command(*given, **options):
    """Exit code, output and errors of a command."""
    with start(*given, **options) as child:
        try:
            out, err = child.communicate(timeout=300)
        finally:
            child.kill()
    return child.returncode, out, err


def run_options(folder, name, **options):
    options = SHORT_RUN | {
        "train_data_dir": folder / "pictures",
        "cache_dir": folder / "cache",
        "output_dir": folder / name,
        "train_batch_size": 4,
        "save_images_steps": 0,
        "num_sample_images": 4,
        "ddpm_num_inference_steps": 4,
        **options,
    }
    return [f"--{option}={value}" for option, value in options.items()]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publishing")
    (folder / "pictures").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def published(work):
    """A Hub with a run of train.py that published itself in the middle and at the end: (hub, run, what it printed)."""
    with Hub({"tok-a": ("alice", "write"), "tok-r": ("alice", "read"), "tok-b": ("bob", "write")}) as hub:
        to_hub = {"push_to_hub": True, "push_to_hub_steps": 3, "hub_model_id": "alice/pictures", "license": "cc0-1.0"}
        options = run_options(work, "run", hub_private_repo=True, **to_hub)
        code, out, err = command(hub, work / "home", "train.py", *options)
        assert code == 0, err
        yield hub, work / "run", out + err


# ---- Publishing ------------------------------------------------------------------------------------------------------


def test_a_run_publishes_itself(published):
    hub, _run, said = published
    repo = hub.repo("alice/pictures")
    titles = [commit.message for commit in repo.commits[1:]]
    assert [title.split(" (")[0] for title in titles] == ["run, step 3", "run, step 6"], said
    first, last = (set(commit.files) - {".gitattributes"} for commit in repo.commits[1:])
    assert first == last == ALL and len(ALL) <= 20
    assert repo.private
    created = hub.asked("POST", "/api/repos/create")[0]
    assert created.time < min(request.time for request in hub.asked("POST", "/commit/"))
    assert set(repo.tags.values()) == {commit.sha for commit in repo.commits[1:]}
    assert "Published" in said and "WARNING" not in said


def test_what_is_published_is_the_run(published):
    hub, run, _ = published
    files = hub.repo("alice/pictures").head.files
    for name in MODEL | {"samples.png", "walk.png"}:
        assert files[name] == (run / "pipeline" / name).read_bytes(), name
    assert files["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    config = yaml.safe_load(files["config.yaml"])
    assert config["train_data_dir"] == "pictures" and config["learning_rate"] == 1e-3
    assert not {"output_dir", "cache_dir", "hub_model_id", "push_to_hub"} & set(config)
    for name, content in files.items():
        for private in (str(run.parent), "tok-a", str(Path.home()) + "/"):
            assert private.encode() not in content, (name, private)
    assert Image.open(io.BytesIO(files["samples.png"])).size[0] > 100


def test_the_card(published):
    hub, run, _ = published
    repo = hub.repo("alice/pictures")
    card = repo.head.files["README.md"].decode()
    assert check_card(card) == ([], [])
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc0-1.0" and front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "model-index" not in front and "datasets" not in front
    (tag,) = [name for name, sha in repo.tags.items() if sha == repo.head.sha]
    assert card.count(f'"alice/pictures", revision="{tag}"') == 3
    assert "$" not in card and "<!--" not in card and "None" not in card
    training = json.loads((run / "pipeline" / "training.json").read_text())
    for words in (
        "Nothing was measured",
        "| optimizer steps | 6, with 4 images each |",
        "| images seen | 24 |",
        f"torch {training['versions']['torch']}",
        "10 images of folder pictures",
        "python training/train.py --config config.yaml --train_data_dir path/to/pictures",
        "![A grid of samples](samples.png)",
        "![The walk out of a picture, and home to a new one](walk.png)",
    ):
        assert words in card, words
    parameters = card.parameters_in(run / "pipeline" / stage.WEIGHTS)
    assert f"| parameters of the network | {parameters:,} |" in card


def test_publishing_again_changes_nothing(published, tmp_path):
    hub, run, _ = published
    repo = hub.repo("alice/pictures")
    before, tags = list(repo.commits), dict(repo.tags)
    again = ("--hub_model_id", "alice/pictures", "--license", "cc0-1.0")
    code, out, err = command(hub, tmp_path, "publish.py", run, *again)
    assert code == 0 and repo.commits == before and repo.tags == tags, err
    assert "Nothing has changed since it was published" in out


def test_a_tag_and_half_precision(published, tmp_path):
    """A second publication adds files; a third takes them out again; a tag that is taken is refused."""
    hub, run, _ = published
    repo = hub.create("alice/tagged")
    code, _, err = command(
        hub, tmp_path, "publish.py", run, "--hub_model_id", "tagged", "--revision_tag", "v1", "--fp16"
    )
    assert code == 0 and list(repo.tags) == ["v1"], err
    assert set(repo.head.files) == ALL | {stage.HALF_WEIGHTS, ".gitattributes"}
    assert "license: unknown" in repo.head.files["README.md"].decode()
    code, _, err = command(hub, tmp_path, "publish.py", run, "--hub_model_id", "alice/tagged", "--revision_tag", "v1")
    assert code == 3 and "tag v1 already" in err and len(repo.commits) == 2
    code, _, err = command(hub, tmp_path, "publish.py", run, "--hub_model_id", "alice/tagged", "--revision_tag", "v2")
    assert code == 0 and set(repo.head.files) == ALL | {".gitattributes"} and len(repo.commits) == 3, err
    assert repo.tags["v1"] == repo.commits[1].sha and repo.tags["v2"] == repo.commits[2].sha


def test_a_dry_run_sends_nothing(published, tmp_path):
    _, run, _ = published
    with Hub({}) as hub:
        code, out, err = command(hub, tmp_path, "publish.py", run, "--hub_model_id", "alice/x", "--dry_run", token=None)
        assert code == 0 and hub.requests == [], err
    size = (run / "pipeline" / stage.WEIGHTS).stat().st_size
    assert f"{size:,}  {stage.WEIGHTS}" in out
    assert "# x" in out and "in 10 files, for alice/x with the tag sha256-" in out
    assert "package, remote code: pictures differ by 0 of 255" in out


# ---- Loading ---------------------------------------------------------------------------------------------------------

LOAD = """
import json, os, sys
if sys.argv[1] == "without":
    sys.modules["ddpm_pipeline"] = None
import diffusers, numpy as np, torch
diffusers.utils.logging.disable_progress_bar()
report = {}

def draw(name, kind, repo="alice/pictures", **options):
    pipe = kind.from_pretrained(repo, **options)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
    np.save(f"{sys.argv[2]}/{name}.npy", images)
    report[name] = type(pipe).__module__
    return pipe
"""


def loaded(hub, home, out, script, *, package, **variables):
    environment = hub.environment(home, "tok-a") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    arguments = ["with" if package else "without", str(out)]
    result = subprocess.run(
        [sys.executable, "-c", f"{LOAD}\n{script}\nprint(json.dumps(report))", *arguments],
        env=environment,
        text=True,
        capture_output=True,
        cwd=out,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_three_ways_back(published, tmp_path):
    """As anybody, with the package, as remote code, of an older commit, and offline after that."""
    hub, _, _ = published
    repo = hub.repo("alice/pictures")
    old = next(name for name, sha in repo.tags.items() if sha == repo.commits[1].sha)
    trust = 'custom_pipeline="pipeline", trust_remote_code=True'
    anyone = f"""
draw("anyone", diffusers.DiffusionPipeline)
draw("anyone, old", diffusers.DiffusionPipeline, revision="{old}")
draw("remote", diffusers.DiffusionPipeline, {trust})
draw("remote, old", diffusers.DiffusionPipeline, revision="{old}", {trust})
"""
    ours = f"""
from ddpm_pipeline import DDPMPipeline
draw("ours", DDPMPipeline)
draw("ours, old", DDPMPipeline, revision="{old}")
"""
    kinds = loaded(hub, tmp_path / "home", tmp_path, anyone, package=False)
    kinds |= loaded(hub, tmp_path / "home", tmp_path, ours, package=True)
    before = len(hub.requests)
    offline = {"HF_HUB_OFFLINE": "1"}
    script = 'draw("anyone, offline", diffusers.DiffusionPipeline)'
    kinds |= loaded(hub, tmp_path / "home", tmp_path, script, package=False, **offline)
    script = 'from ddpm_pipeline import DDPMPipeline\ndraw("ours, offline", DDPMPipeline)'
    kinds |= loaded(hub, tmp_path / "home", tmp_path, script, package=True, **offline)
    assert len(hub.requests) == before
    images = {name: np.load(tmp_path / f"{name}.npy") for name in kinds}
    for name, kind in kinds.items():
        wanted = "diffusers.pipelines" if "anyone" in name else "diffusers_modules" if "remote" in name else "ddpm_pipe"
        assert kind.startswith(wanted), (name, kind)
        same = images["ours, old" if "old" in name else "ours"]
        assert np.abs(images[name] - same).max() <= 1e-5, name
    assert np.abs(images["ours"] - images["ours, old"]).max() > 1e-3


def test_two_models_with_code_of_their_own(published, tmp_path):
    hub, _, _ = published
    files = dict(hub.repo("alice/pictures").head.files)
    marked = files["pipeline.py"] + b"\n\nMARK = 'the other'\n"
    hub.create("bob/other", files=files | {"pipeline.py": marked})
    script = """
trust = {"custom_pipeline": "pipeline", "trust_remote_code": True}
one = draw("one", diffusers.DiffusionPipeline, **trust)
other = draw("other", diffusers.DiffusionPipeline, "bob/other", **trust)
report["marks"] = [type(pipe).walk.__globals__.get("MARK") for pipe in (one, other)]
one.save_pretrained(f"{sys.argv[2]}/saved")
report["saved"] = "MARK" in open(f"{sys.argv[2]}/saved/pipeline.py").read()
"""
    report = loaded(hub, tmp_path / "home", tmp_path, script, package=False)
    assert report["marks"] == [None, "the other"] and not report["saved"]


def test_weights_to_begin_from(published, work, tmp_path):
    """A run begins with published weights: those of its first checkpoint, at a learning rate of nearly nothing."""
    hub, run, _ = published
    from safetensors.numpy import load_file

    options = run_options(work, "tuned", init_from="alice/pictures", max_train_steps=1, learning_rate=1e-12)
    code, out, err = command(hub, tmp_path, "train.py", *options)
    assert code == 0 and "first weights: those of alice/pictures" in out, err
    begun = load_file(work / "tuned" / "checkpoint-000001" / "model.safetensors")
    taken = load_file(run / "pipeline" / stage.WEIGHTS)
    assert begun.keys() == taken.keys()
    for name, tensor in taken.items():
        np.testing.assert_allclose(begun[name], tensor, atol=1e-7, rtol=0, err_msg=name)
    card = {"config": json.loads((work / "tuned" / "pipeline" / "training.json").read_text())["config"]}
    assert card["config"]["init_from"] == "alice/pictures"


# ---- What goes wrong -------------------------------------------------------------------------------------------------

CASES = {  # name: (method, part of the path, the fault, what comes of it)
    "commit 401": ("POST", "/commit/", {"status": 401}, "401"),
    "commit 403": ("POST", "/commit/", {"status": 403}, "403"),
    "commit 404": ("POST", "/commit/", {"status": 404}, "404"),
    "commit 409": ("POST", "/commit/", {"status": 409}, "409"),
    "commit 412": ("POST", "/commit/", {"status": 412}, "412"),
    "commit 413": ("POST", "/commit/", {"status": 413}, "413"),
    "commit 429": ("POST", "/commit/", {"status": 429, "retry_after": 1, "times": 1}, None),
    "commit 500 twice": ("POST", "/commit/", {"status": 500, "times": 2}, None),
    "commit 503 for ever": ("POST", "/commit/", {"status": 503}, "503"),
    "commit cut after": ("POST", "/commit/", {"cut": True, "times": 1}, None),
    "commit cut before": ("POST", "/commit/", {"cut": True, "status": 500, "times": 1}, None),
    "commit silent": ("POST", "/commit/", {"silent": 60}, "not answered"),
    "preupload 503": ("POST", "/preupload/", {"status": 503, "times": 1}, None),
    "preupload 403": ("POST", "/preupload/", {"status": 403}, "403"),
    "tag cut after": ("POST", "/tag/", {"cut": True, "times": 1}, None),
    "tag 500 twice": ("POST", "/tag/", {"status": 500, "times": 2}, None),
    "tag 403": ("POST", "/tag/", {"status": 403}, "403"),
    "read 503 twice": ("GET", "/commits/", {"status": 503, "times": 2}, None),
    "read silent": ("GET", "/refs", {"silent": 60}, "not answered"),
}
PUSH = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ddpm_pipeline import publishing

def push(repo):
    begin = time.monotonic()
    try:
        hub = client.Hub(12)
        push.check_access(hub, repo)
        seen, folder = push.look(hub, repo), Path(sys.argv[1])
        push.check_tag(seen, "v1", "a run, step 6")
        commit = push.push(hub, folder, seen, tag="v1", title="a run, step 6")
        return {"error": None, "commit": commit, "seconds": time.monotonic() - begin}
    except client.HubError as error:
        return {"error": str(error), "seconds": time.monotonic() - begin}

with ThreadPoolExecutor(40) as pool:
    print(json.dumps(list(pool.map(push, sys.argv[2:]))), flush=True)
import os
os._exit(0)
"""


def pushed(hub, home, folder, repos, token="tok-a"):
    """What came of pushing a folder into each of these repositories, all at once."""
    child = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), *repos],
        env=hub.environment(home, token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return dict(zip(repos, json.loads(child.stdout.splitlines()[-1]), strict=True))


@pytest.fixture
def folder(tmp_path):
    """A folder to push; the Hub does not look into it."""
    folder = tmp_path / "staged"
    (folder / "unet").mkdir(parents=True)
    for name in ("model_index.json", "pipeline.py", stage.WEIGHTS):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    return folder


def test_faults_of_the_hub(hub, tmp_path, folder):
    """F28: what will not pass is tried once, what may pass again; a commit is never made twice; silence ends."""
    repos = {name: f"alice/n{number:02}" for number, name in enumerate(CASES)}
    for name, (method, part, fault, _) in CASES.items():
        hub.create(repos[name])
        hub.fault(method, f"{repos[name]}{part}", **fault)
    found = pushed(hub, tmp_path / "home", folder, repos.values())
    for name, (method, part, fault, wanted) in CASES.items():
        seen, repo = found[repos[name]], hub.repo(repos[name])
        commits = len(repo.commits) - 1
        tries = len(hub.asked(method, f"{repos[name]}{part}"))
        assert commits <= 1, (name, seen)
        if wanted is None:
            assert (seen["error"], commits, repo.tags) == (None, 1, {"v1": repo.head.sha}), (name, seen)
            assert seen["commit"] == repo.head.sha
        else:
            assert seen["error"] is not None and wanted in seen["error"], (name, seen)
            assert repo.tags == {}, name
            if fault.get("status") in (401, 403, 404, 409, 412, 413):
                assert tries == 1, (name, tries)
        assert seen["seconds"] < 20, (name, seen)
    assert len(hub.asked("POST", f"{repos['commit 503 for ever']}/commit/")) > 2


def test_repositories_that_are_not_ours_to_fill(hub, tmp_path, folder):
    """Other things in it, somebody else's, one that we may not read, and one into which another pushes meanwhile."""
    hub.create("alice/full", files={"tokenizer.json": b"{}"})
    hub.create("alice/card", files={"README.md": b"---\nlicense: mit\n---\n"})  # made on the Hub's page
    hub.create("bob/x")
    hub.create("bob/secret", private=True)
    found = pushed(hub, tmp_path / "home", folder, ["alice/full", "alice/card", "bob/x", "bob/secret"])
    assert "tokenizer.json" in found["alice/full"]["error"] and len(hub.repo("alice/full").commits) == 2
    assert found["alice/card"]["error"] is None
    for name in ("bob/x", "bob/secret"):
        assert "is not yours" in found[name]["error"], found[name]
        assert len(hub.repo(name).commits) == 1


def test_somebody_else_pushes_meanwhile(hub, tmp_path, folder):
    """Between looking at the newest commit and making ours: theirs stays the newest."""
    hub.create("alice/x")
    with hub.fault("GET", "alice/x/refs", silent=3):  # our push waits here
        child = subprocess.Popen(
            [sys.executable, "-c", PUSH, str(folder), "alice/x"],
            env=hub.environment(tmp_path / "home", "tok-a") | {"PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
        )
        with child:
            while not hub.asked("GET", "alice/x/refs"):
                assert child.poll() is None
                time.sleep(0.02)
            hub.push("alice/x", {"notes.txt": b"theirs"})
            out, _ = child.communicate(timeout=60)
    (seen,) = json.loads(out.splitlines()[-1])
    assert "somebody else has pushed" in seen["error"]
    assert "notes.txt" in hub.repo("alice/x").head.files and len(hub.repo("alice/x").commits) == 2


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, "alice/x", "there is no token"),
        ("tok-r", "alice/x", "403"),
        ("tok-b", "alice/x", "alice/x is not yours to write: the token is of bob"),
        ("wrong", "alice/x", "401"),
    ],
)
def test_who_may_not_publish_is_told_before_training(hub, work, tmp_path, token, repo, words):
    options = run_options(work, f"never {token}", push_to_hub=True, hub_model_id=repo)
    code, _out, err = command(hub, tmp_path, "train.py", *options, token=token)
    assert code == 3 and words in err and "Nothing was trained" in err, err
    assert not list((work / f"never {token}").glob("checkpoint-*")) and "training:" not in err
    assert "Traceback" not in err and hub.repos == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, work, tmp_path):
    hub.create("alice/x")
    options = run_options(work, "public", push_to_hub=True, hub_model_id="alice/x", hub_private_repo=True)
    code, _, err = command(hub, tmp_path, "train.py", *options)
    assert code == 3 and "is public" in err, err


def test_training_outlives_the_hub(hub, work, tmp_path):
    """The Hub breaks down after the check: the run ends whole, with 3 and the command for later, which then works."""
    fault = hub.fault("GET", "/refs", status=403)
    options = run_options(work, "later", push_to_hub=True, push_to_hub_steps=4, hub_model_id="alice/later")
    code, _out, err = command(hub, tmp_path, "train.py", *options)
    assert code == 3, err
    assert "WARNING: the model was not published" in err and "The run goes on" in err
    assert "The run is as it was. To publish it later:" in err
    assert check_folder(work / "later" / "pipeline") is None
    printed = re.search(r"^ {4}python (.*)$", err, re.MULTILINE)[1]
    hub.end_fault(fault)
    environment = hub.environment(tmp_path, "tok-a")
    again = f"{sys.executable} {printed}"
    result = subprocess.run(again, shell=True, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert set(hub.repo("alice/later").head.files) == ALL | {".gitattributes"}


def test_a_signal_while_it_is_sent(hub, work, tmp_path):
    """SIGTERM in the upload at the end: 143 at once, and nobody goes on with it."""
    options = run_options(work, "stopped", push_to_hub=True, hub_model_id="alice/stopped")
    hub.fault("GET", "/refs", silent=60)
    with start(hub, tmp_path, "train.py", *options) as child:
        while not hub.asked("GET", "/refs"):
            assert child.poll() is None, child.communicate()
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert child.wait(20) == 143 and time.monotonic() - begin < 20
        child.communicate()
    found = subprocess.run(["pgrep", "-f", f"{work}/stopped"], capture_output=True, text=True)
    assert found.stdout == ""
    assert len(hub.repo("alice/stopped").commits) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "--hub_model_id", "alice/x"), "nowhere"),
        (("{run}", "--hub_model_id", "alice/x/y"), "alice/x/y"),
        (("{run}",), "--hub_model_id"),
        (("{run}", "--hub_model_id", "alice/x", "--license", "mine"), "license is 'mine', which the Hub does not know"),
        (("{run}", "--hub_model_id", "alice/x", "--revision_tag", "bad tag"), "revision_tag is 'bad tag'"),
        (("{run}", "--hub_model_id", "alice/x", "--hub_timeout", "0"), "hub_timeout is 0"),
        (("{run}", "--hub_model_id", "alice/x", "--no_such"), "--no_such"),
    ],
)
def test_mistakes_end_with_2(published, hub, tmp_path, arguments, words):
    _, run, _ = published
    code, _, err = command(hub, tmp_path, "publish.py", *(argument.format(run=run) for argument in arguments))
    assert code == 2 and words in err and "Traceback" not in err, err
    assert all(len(hub.repo(name).commits) == 1 for name in hub.repos)


def test_silence_ends_publish_py(published, hub, tmp_path):
    _, run, _ = published
    hub.fault("GET", "/whoami", silent=60)
    begin = time.monotonic()
    code, _, err = command(hub, tmp_path, "publish.py", run, "--hub_model_id", "alice/x", "--hub_timeout", "1")
    assert code == 3 and time.monotonic() - begin < 40, err
    assert "its 1 seconds are over" in err and f"publish.py {run} --hub_model_id alice/x --hub_timeout 1" in err


def test_code_that_draws_other_pictures_is_not_sent(published, hub, tmp_path):
    """Remote code that differs from the package, as a model has that an older version of it has saved."""
    import shutil

    _, run, _ = published
    shutil.copytree(run, tmp_path / "run")
    code_file = tmp_path / "run" / "pipeline" / "pipeline.py"
    text = code_file.read_text()
    assert "x_t = output.prev_sample\n" in text
    code_file.write_text(text.replace("x_t = output.prev_sample\n", "x_t = output.prev_sample * 1.001\n"))
    code, _, err = command(hub, tmp_path, "publish.py", tmp_path / "run", "--hub_model_id", "alice/x")
    assert code == 1 and "Nothing was sent" in err and len(hub.repo("alice/x").commits) == 1, err
    assert os.environ.get("HF_ENDPOINT") != hub.url  # this process knows nothing of it
