"""The house around the code: who imports whom, what README.md promises, what the packaging files hold."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CODE = ("ddpm_pipeline", "training", "benchmarks")
NOT_OURS = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}


@lru_cache
def project_files() -> list[str]:
    """Paths from the root: tracked and new files that git does not ignore; in a copy without .git, all but NOT_OURS."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listing.returncode == 0:  # git refuses a checkout that belongs to another user
            return sorted({name for name in listing.stdout.split("\0") if (ROOT / name).is_file()})
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in files
        if NOT_OURS.isdisjoint(path.parts) and not any(part.endswith(".egg-info") for part in path.parts)
    )


def python_files(*folders: str) -> list[str]:
    return [name for name in project_files() if name.endswith(".py") and name.split("/")[0] in folders]


# ---- Imports go one way ----------------------------------------------------------------------------------------------


def imports(name: str) -> set[str]:
    """Everything the file imports, anywhere in it, as full dotted names: `from .a import b` is ddpm_pipeline.a.b.

    A chapter that is not written yet imports nothing.
    """
    found: set[str] = set()
    if name not in project_files():
        return found
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = Path(name).parent.parts[: len(Path(name).parent.parts) - node.level + 1] if node.level else ()
            module = [*package, node.module] if node.module else [*package]
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


def inside(imported: str, *modules: str) -> bool:
    return any(imported == module or imported.startswith(module + ".") for module in modules)


def test_the_remote_code_files_import_little():
    walk, loading, images, fusion = (
        f"ddpm_pipeline.{name}" for name in ("scheduling_ddpm", "loading", "images", "fusion")
    )
    for name, more in (
        ("scheduling_ddpm", ()),
        ("loading", ("safetensors", walk)),
        ("images", (walk,)),
        ("fusion", (walk, images)),
        ("pipeline_ddpm", (walk, loading, images, fusion)),
    ):
        allowed = (*sys.stdlib_module_names, "numpy", "torch", "PIL", "diffusers", *more)
        found = imports(f"ddpm_pipeline/{name}.py")
        assert any(inside(i, "torch") for i in found)
        assert {i for i in found if not inside(i, *allowed)} == set(), name


@pytest.mark.parametrize("name", ["objective", "likelihood", "calibration"])
def test_the_mathematics_knows_the_scheduler_and_chance_and_nothing_else_of_ours(name):
    ours = {i for i in imports(f"ddpm_pipeline/{name}.py") if inside(i, *CODE)}
    assert {i for i in ours if not inside(i, "ddpm_pipeline.scheduling_ddpm", "ddpm_pipeline.chance")} == set()


def test_publishing_does_no_mathematics():
    """Plain `import torch` is allowed: what is published must be finite, and someone has to look."""
    maths = [f"torch.{name}" for name in ("nn", "linalg", "fft", "special", "distributions", "autograd", "optim")]
    maths += [f"ddpm_pipeline.{name}" for name in ("objective", "likelihood", "calibration", "fidelity")]
    maths += ["numpy", "scipy", "torchmetrics", "torchdiffeq"]
    assert {i for i in imports("ddpm_pipeline/publishing.py") if inside(i, *maths)} == set()


def test_the_package_does_not_know_who_uses_it():
    files = python_files("ddpm_pipeline")
    assert len(files) > 2
    for name in files:
        assert {i for i in imports(name) if inside(i, "training", "benchmarks", "tests")} == set(), name


def test_nothing_imports_the_training_script():
    for name in python_files(*CODE, "tests"):
        # files beside train.py could also find it under its bare name
        assert {i for i in imports(name) if inside(i, "training.train", "train")} == set(), name


def test_the_remote_code_files_can_be_joined_into_one():
    """pipeline.py in a published folder is these files one after the other, without their relative imports.

    A __future__ import may not stand in the middle of a file. diffusers finds relative imports by a regular expression
    over the text, so none may stand in a docstring either. What two files call by one name would be one thing.
    """
    names: dict[str, str] = {}
    before: set[str] = set()
    for name in ("scheduling_ddpm", "loading", "images", "fusion", "pipeline_ddpm"):
        text = (ROOT / "ddpm_pipeline" / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^\s*from\s+__future__\s", text, re.M), name
        tree = ast.parse(text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert len(re.findall(r"^\s*(?:from|import)\s+\.\S*.*$", text, re.M)) == len(nodes)
        for node in nodes:
            assert node.level == 1 and node.module in before and node.col_offset == 0
            assert node.lineno == node.end_lineno, "a relative import must stand on one line, to be taken out"
            assert all(alias.asname is None for alias in node.names)
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            defined = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            defined += [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            for what in defined:
                assert names.setdefault(what, name) == name, f"{what} is in {names[what]} and in {name}"
        before.add(name)


# ---- README.md and the other texts -----------------------------------------------------------------------------------


def readme_tree() -> list[str]:
    """The paths in the fenced block of README.md that lists ddpm_pipeline/.

    One line, one path: the first word, below the last folder (a name that ends in /) that is indented less.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    trees = [block for block in blocks if re.search(r"^\W*ddpm_pipeline/(\s|$)", block, re.M)]
    assert len(trees) == 1, f"README.md has {len(trees)} fenced blocks with a line for ddpm_pipeline/, not one"
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, trees[0].splitlines()):
        words = re.sub(r"^[\s|`+\-\u2500-\u257f]*", "", line)
        column, path = len(line) - len(words), words.split()[0]
        while folders and folders[-1][0] >= column:
            folders.pop()
        if folders:
            path = folders[-1][1] + path
        if path.endswith("/"):
            folders.append((column, path))
        paths.append(path)
    return paths


def test_readme_names_every_file_of_code_once():
    named = Counter(path for path in readme_tree() if path.endswith(".py"))
    files = python_files(*CODE)
    assert files
    assert {name: named[name] for name in files if named[name] != 1} == {}


def test_readme_names_only_what_exists():
    missing = [path for path in readme_tree() if not any(ROOT.glob(path.rstrip("/")))]
    assert missing == []


def test_texts_are_plain_and_name_no_machine():
    machine = re.compile(
        r"(?<![\w./:~-])/(?:home|root|work|tmp|mnt|Users)/"  # a path on the machine it was written on
        r"|\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org)\b|--(?:extra-)?index-url"
    )
    files = project_files()
    assert "setup.cfg" in files
    for name in files:
        content = (ROOT / name).read_bytes()
        if b"\0" in content:
            continue  # no text
        if name.endswith(".py"):
            assert content.isascii(), name
        found = machine.search(content.decode("utf-8"))
        assert found is None, f"{name}: {found}"


# ---- Packaging -------------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line)] == []
    versions: dict[str, str] = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    assert len(versions) == len(lines), "a name stands there twice"
    return versions


def test_every_dependency_has_an_exact_version():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    groups = {**setup["options.extras_require"], "core": setup["options"]["install_requires"]}
    del groups["demo"]  # gradio: no test runs it
    versions = pins()
    wanted = [Requirement(line) for group in groups.values() for line in group.split("\n") if line]
    ours = [requirement for requirement in wanted if requirement.name == setup["metadata"]["name"]]
    assert all(extra in groups for requirement in ours for extra in requirement.extras)
    for requirement in wanted:
        if requirement not in ours:
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, requirement
            assert requirement.specifier.contains(version), requirement


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# ---- The model card --------------------------------------------------------------------------------------------------


def test_the_model_card_says_where_each_of_its_fields_comes_from():
    text = (ROOT / "model_card.md").read_text(encoding="utf-8")
    (comment,) = re.findall(r"<!--.*?-->\n", text, re.S)
    explained = re.findall(r"^([a-z_]+): ", comment, re.M)
    assert "$" not in comment  # or the explanation is filled in as well
    used = set(re.findall(r"\$(\w+)", text))
    assert sorted(used) == sorted(explained)
    assert text.split("---\n")[1] == "$metadata\n"  # what is in it: tests/test_publishing.py
