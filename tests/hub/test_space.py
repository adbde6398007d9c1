"""A model is published with its demo as a Space; the Space is downloaded and started as the Hub does it."""

import json
import re
import subprocess
import sys
import threading
import venv
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml

from ddpm_pipeline import DDPMPipeline
from tests.hub.commands import ROOT, publish_all, run_code
from tests.hub.repositories import check_card
from tests.hub.server import TOKENS, Hub
from tests.models import quiet, tiny_unet
from tests.test_publishing import make_run

pytest.importorskip("gradio", reason="needs gradio, of the extra demo")

from benchmarks.demo import Visitor, pictures
from training.hub import push
from training.hub.space import stage_space

SPACE = {"app.py", "requirements.txt", "README.md", "LICENSE", ".gitattributes"}  # beside the package
COMMANDS = {  # name: arguments after the run
    "new": ("alice/moons", "--space", "moons-demo"),
    "again": ("alice/moons", "--space", "alice/moons-demo"),
    "private": ("alice/secret", "--space", "alice/secret-demo", "--hub_private_repo"),
    "of a private model": ("alice/secret", "--space", "alice/secret-demo-2"),
    "public": ("alice/secret", "--space", "alice/public"),  # exists, and is public
    "foreign": ("alice/foreign", "--space", "alice/foreign"),  # exists, with files of something else
    "somebody else's": ("alice/bobs", "--space", "bob/x"),
    "silent": ("alice/silent", "--space", "alice/silent", "--hub_timeout", "5"),
    "failing": ("alice/failing", "--space", "alice/failing"),
    "failed": ("alice/failing", "--space", "alice/failing"),
    "dry": ("alice/dry", "--space", "alice/dry", "--dry_run"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub, the folder of a run, and exit code, output and errors of each of COMMANDS, by name."""
    folder = make_run(tmp_path_factory.mktemp("space") / "moons")
    with Hub(TOKENS) as hub:
        hub.create("spaces/alice/public")
        hub.create("spaces/alice/foreign", files={"main.py": b""})
        hub.fault("GET", "/api/spaces/alice/silent", silent=60)
        hub.fault("POST", "/api/spaces/alice/failing/commit", status=403, times=1)
        arguments = [[str(folder), "--hub_model_id", *command] for command in COMMANDS.values()]
        results = publish_all(hub, folder.parent / "home", arguments, checked=False)
        yield hub, folder, dict(zip(COMMANDS, results))


def test_a_space_is_one_commit_with_the_package(published):
    hub, _, results = published
    code, out, err = results["new"]
    assert code == 0 and "/spaces/alice/moons-demo" in out, err
    model, space = hub.repo("alice/moons"), hub.repo("spaces/alice/moons-demo")
    assert len(space.commits) == 2 and not space.private
    files = space.head.files
    package = {name for name in files if name not in SPACE}
    ours = [path for path in (ROOT / "ddpm_pipeline").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert package == {path.relative_to(ROOT).as_posix() for path in ours}
    assert all(files[path.relative_to(ROOT).as_posix()] == path.read_bytes() for path in ours)
    (tag,) = model.tags
    assert f'"alice/moons", "--revision", "{tag}"' in files["app.py"].decode()
    card = files["README.md"].decode()
    assert check_card(card) == ([], [])
    fields = yaml.safe_load(card.split("---")[1])
    assert (fields["sdk"], fields["models"], fields["app_file"]) == ("gradio", ["alice/moons"], "app.py")
    pins = dict(line.split("==") for line in files["requirements.txt"].decode().splitlines())
    assert pins["gradio"] == fields["sdk_version"] == version("gradio")
    assert {name: version(name).split("+")[0] for name in pins} == pins and {"torch", "diffusers"} <= set(pins)
    for name, content in files.items():
        assert b"tok-a" not in content and str(Path.home()).encode() + b"/" not in content, name


def test_publishing_again_changes_nothing(published):
    hub, _, results = published
    code, out, err = results["again"]
    assert code == 0 and out.count("Unchanged since it was published") == 2, err
    assert len(hub.repo("alice/moons").commits) == len(hub.repo("spaces/alice/moons-demo").commits) == 2


def test_the_space_of_a_private_model_is_private(published):
    hub, _, results = published
    for name, space in (("private", "secret-demo"), ("of a private model", "secret-demo-2")):
        code, out, err = results[name]
        assert code == 0 and "add a secret HF_TOKEN" in out, err
        assert hub.repo(f"spaces/alice/{space}").private
    created = [request.path for request in hub.requests_of("POST", "/api/repos/create")]
    assert created and not hub.requests_of("PUT", "/settings")  # private from the start
    code, _, err = results["public"]
    assert code == 3 and "alice/public exists and is public" in err and "give another space" in err
    assert len(hub.repo("spaces/alice/public").commits) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foreign", "alice/foreign has files that are not part of a demo (main.py): give another space"),
        ("somebody else's", "no write access to bob/x: the token belongs to alice; give a space of this user"),
        ("silent", "no answer from the Hub within its 5 seconds"),
    ],
)
def test_nothing_is_sent_if_there_can_be_no_space(published, name, message):
    hub, _, results = published
    code, _, err = results[name]
    assert code == 3 and message in err, err
    assert COMMANDS[name][0] not in hub.repos


def test_a_model_stays_published_if_its_space_fails(published):
    """The same command publishes the Space later."""
    hub, _, results = published
    code, _, err = results["failing"]
    assert code == 3 and "the model is published, its Space alice/failing is not" in err and "403" in err
    assert "To publish it later:" in err and "--space alice/failing" in err
    code, out, err = results["failed"]
    assert code == 0 and out.count("Unchanged") == 1, err
    assert len(hub.repo("alice/failing").commits) == len(hub.repo("spaces/alice/failing").commits) == 2


def test_a_dry_run_shows_the_space(published):
    hub, _, results = published
    code, out, err = results["dry"]
    assert code == 0 and not hub.requests_of("GET", "alice/dry") and "alice/dry" not in hub.repos, err
    assert "ddpm_pipeline/demo/page.py" in out and "sdk: gradio" in out and "files, for the Space alice/dry" in out


@pytest.mark.parametrize("names", [("user/mine/x", None), ("user/mine", "user/-demo"), ("user/mine", "")])
def test_names_are_checked_first(tmp_path, names):
    with pytest.raises(ValueError, match=r"Repo id"):
        push.show(tmp_path / "no run", names[0], space=names[1])


def test_a_model_that_the_demo_does_not_take_is_refused(tmp_path):
    run = make_run(tmp_path / "large", unet=tiny_unet(3, 1024))
    with pytest.raises(ValueError, match="1024 x 1024 pixels: the demo takes up to 512"):
        stage_space(run / "pipeline", tmp_path / "out", space_id="alice/x", repo_id="alice/y", tag="v1")
    assert not (tmp_path / "out").exists()


def test_the_downloaded_space_draws(published, tmp_path):
    """In a fresh environment, which has this one's packages by a .pth file, with the variables that the Hub sets."""
    hub, folder, _ = published
    download = """
import json, sys
from huggingface_hub import snapshot_download
print(json.dumps(snapshot_download("alice/moons-demo", repo_type="space", local_dir=sys.argv[1])))
"""
    space = Path(run_code(hub, tmp_path / "home", download, tmp_path / "space"))
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    variables = {"SYSTEM": "spaces", "SPACE_ID": "alice/moons-demo", "OMP_NUM_THREADS": "1"}
    environment = hub.environment(tmp_path / "home") | variables
    environment.pop("PYTHONPATH", None)
    command = [tmp_path / "env" / "bin" / "python", "-u", "app.py"]
    with subprocess.Popen(command, cwd=space, env=environment, stdout=subprocess.PIPE, text=True) as app:
        try:
            port = next(match[1] for line in app.stdout if (match := re.search(r"http://0\.0\.0\.0:(\d+)", line)))
            threading.Thread(target=app.stdout.read, daemon=True).start()
            shown = pictures(Visitor(f"http://127.0.0.1:{port}").run("generate", 2, 1, -1, 5, 4, 0, 1, 1))
        finally:
            app.terminate()
    expected = quiet(DDPMPipeline.from_pretrained(folder / "pipeline"))(seeds=[5, 6], num_inference_steps=4).images
    assert all(map(np.array_equal, shown, expected)) and len(shown) == 2
    assert json.loads(shown[0].text["settings"])["model"] == "alice/moons"
