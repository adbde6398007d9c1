"""README.md and docs/: every block of code runs, every link has a target, every table of settings is current."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import Hub
from tests.run_docs import blocks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = """```sh
python examples/sample.py
python examples/interpolate.py
python examples/other_scheduler.py
python examples/finetune.py runs/mine/pipeline my/images runs/finetuned --max_train_steps 1 --cache_dir cache
```
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{page: None or what failed}: all pages in one process, which reads the address of the Hub once."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples-page.md").write_text(EXAMPLES)
    pages = [str(page) for page in [*PAGES, folder / "examples-page.md"] if blocks(page)]
    with Hub({"token": ("user", "write")}) as hub:
        environment = hub.environment(folder / "home", token="token")
        command = [sys.executable, str(ROOT / "tests" / "run_docs.py"), str(folder), *pages]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert child.returncode == 0, child.stdout + child.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, results):
    assert results[str(page)] is None, results[str(page)]


def test_the_examples_run(results):
    (name,) = [page for page in results if page.endswith("examples-page.md")]
    assert results[name] is None, results[name]


def test_blocks_that_are_not_run_name_what_they_need():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for reason in re.findall(r"<!-- not run: (.*?) -->", text):
            assert reason.startswith("needs "), f"{page.name}: {reason}"


def anchors(page):
    """The anchors of the headings of a page, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHER_PAGES = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_a_target(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_the_tables_of_settings_are_current():
    command = [sys.executable, str(ROOT / "docs" / "site" / "make_tables.py"), "--check"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


def test_every_image_of_the_docs_is_used():
    used = {Path(target).name for page in PAGES for target in re.findall(r"\]\(([^)\s]+\.png)\)", page.read_text())}
    assert {path.name for path in (ROOT / "docs" / "images").glob("*.png")} - used == set()


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
