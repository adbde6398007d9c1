"""THE SPACE: a folder with the demo of a published model, which the Hub runs.

The package itself is in it, beside app.py: what runs there is what was tested here, and it comes from no other address.
"""

from __future__ import annotations

import configparser
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

from training.hub.files import CARD, PACKAGE, ROOT
from training.progress import quiet_libraries

SUFFIXES = (".py", ".typed", ".c", ".js", ".css", ".json", ".html", "LICENSE")  # of the package's files
APP = Template('''"""The demo of $repo_id, at its tag $tag."""

import sys

from ddpm_pipeline.__main__ import main

if __name__ == "__main__":
    # port 0 is 7860, which the Hub expects, where it is free
    sys.exit(main(["demo", "$repo_id", "--revision", "$tag", "--host", "0.0.0.0", "--port", "0"]))
''')
README = Template("""---
title: "$title"
sdk: gradio
sdk_version: $gradio
python_version: "$python"
app_file: app.py
license: apache-2.0
models:
- $repo_id
---

# $title

The demo of the model `$repo_id`, at its tag `$tag`: generate images, interpolate between two, repair one, and watch a
trajectory. Its code is that of `ddpm_pipeline`, in the folder of this name, under the licence in `LICENSE`; the licence
of the weights is on the model's page.

If the model is private, this Space needs a secret `HF_TOKEN` with a token that may read it.
""")


def stage_space(model: Path, folder: Path, *, space_id: str, repo_id: str, tag: str) -> None:
    """Write the folder of a Space that serves the demo of a model at a tag.

    Args:
        model: the staged folder of the model.
        folder: missing.
        space_id, repo_id: "user/name" of the Space and of the model.
    Raises:
        ValueError: gradio is not installed, or the demo does not take the model.
    """
    pins = requirements()
    check_model(model, repo_id)
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=_not_of_the_package)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    lines = "".join(f"{name}=={pin}\n" for name, pin in pins.items())
    (folder / "requirements.txt").write_text(lines, encoding="utf-8")
    fields = {
        "title": space_id.split("/")[-1],
        "repo_id": repo_id,
        "tag": tag,
        "gradio": pins["gradio"],
        "python": "{}.{}".format(*sys.version_info),
    }
    (folder / "app.py").write_text(APP.substitute(fields), encoding="utf-8")
    (folder / CARD).write_text(README.substitute(fields), encoding="utf-8")


def requirements() -> dict[str, str]:
    """The packages that the demo needs, with their versions here.

    Raises:
        ValueError: one of them is not installed.
    """
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = (setup["options"]["install_requires"] + setup["options.extras_require"]["demo"]).split("\n")
    names = [re.split("[<>=!~]", line)[0] for line in lines if line]
    try:
        return {name: version(name).split("+")[0] for name in names}  # torch 2.13.0+cpu is 2.13.0 on an index
    except PackageNotFoundError as error:
        raise ValueError(
            f'space: {error.name} is not installed: pip install -e ".[demo]". A Space runs the versions that are here'
        ) from None


def check_model(model: Path, name: str) -> None:
    """Raise ValueError if the demo does not take the model in this folder."""
    from ddpm_pipeline import DDPMPipeline  # imports torch: not before it is needed
    from ddpm_pipeline.demo.jobs import Model

    quiet_libraries()
    pipe: Any = DDPMPipeline.from_pretrained(model)
    Model(pipe, name)


def _not_of_the_package(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and not name.endswith(SUFFIXES)] + ["__pycache__"]
