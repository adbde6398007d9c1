"""Rules for the whole project: who may import whom, sizes of files, texts, packaging, the model card's template."""

import ast
import configparser
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ddpm_pipeline.saving import BUNDLED

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


# ---- Imports ---------------------------------------------------------------------------------------------------------

ENTRY_POINTS = ("train", "evaluate", "choose_ema", "publish", "curve")
# What a package of training/ may import of the others: no more than those before it.
TRAINING_ORDER = ("data", "run", "evaluation", "calibration", "hub")


def imports(name: str) -> set[str]:
    """Everything the file imports, anywhere in it, as full dotted names: `from .a import b` is ddpm_pipeline.a.b."""
    found: set[str] = set()
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


def test_bundled_files_import_little():
    for i, name in enumerate(BUNDLED):
        bundled_before = [f"ddpm_pipeline.{other}" for other in BUNDLED[:i]]
        allowed = (*sys.stdlib_module_names, "numpy", "torch", "PIL", "diffusers", "safetensors", *bundled_before)
        found = imports(f"ddpm_pipeline/{name}.py")
        assert any(inside(i, "torch", "numpy", "ddpm_pipeline") for i in found)
        assert {i for i in found if not inside(i, *allowed)} == set(), name


@pytest.mark.parametrize("name", ["objective", "timesteps", "loss_weights", "likelihood"])
def test_the_mathematics_imports_scheduler_random_numbers_and_pixels_only(name):
    """And the objective the bound, which trains a learned variance, and the timesteps."""
    ours = {i for i in imports(f"ddpm_pipeline/{name}.py") if inside(i, *CODE)}
    modules = ["scheduling_ddpm", "rng", "pixels", "precision", "transfer"]
    modules += ["likelihood", "timesteps"] if name == "objective" else []
    allowed = [f"ddpm_pipeline.{module}" for module in modules]
    assert {i for i in ours if not inside(i, *allowed)} == set()


def test_publishing_does_no_mathematics():
    """Plain `import torch` is allowed, for dtypes and for the check that published weights are finite."""
    maths = [f"torch.{name}" for name in ("nn", "linalg", "fft", "special", "distributions", "autograd", "optim")]
    maths += [f"ddpm_pipeline.{name}" for name in ("objective", "likelihood", "fidelity")]
    maths += ["numpy", "scipy", "torchmetrics", "torchdiffeq"]
    files = [name for name in python_files("training") if name.startswith("training/hub/")]
    assert len(files) > 4
    for name in files:
        assert {i for i in imports(name) if inside(i, *maths)} == set(), name


def test_the_package_imports_nothing_that_uses_it():
    files = python_files("ddpm_pipeline")
    assert len(files) > 2
    for name in files:
        assert {i for i in imports(name) if inside(i, "training", "benchmarks", "tests")} == set(), name


def test_nothing_imports_an_entry_point():
    modules = [f"training.{name}" for name in ENTRY_POINTS]
    for name in python_files(*CODE, "examples", "docs"):
        assert {i for i in imports(name) if inside(i, *modules, *ENTRY_POINTS)} == set(), name


def test_the_packages_of_training_import_one_way():
    for i, package in enumerate(TRAINING_ORDER):
        later = [f"training.{name}" for name in TRAINING_ORDER[i + 1 :]]
        for name in python_files("training"):
            if name.startswith(f"training/{package}/"):
                assert {i for i in imports(name) if inside(i, *later)} == set(), name


def test_the_bundled_files_can_be_joined_into_one():
    """pipeline.py in a published folder is these files one after the other, without their relative imports.

    A __future__ import must be at the top of a file. diffusers finds relative imports by a regular expression over the
    text, so a docstring may not have one either. In one file the second definition of a name replaces the first.
    """
    names: dict[str, str] = {}
    before: set[str] = set()
    for name in BUNDLED:
        text = (ROOT / "ddpm_pipeline" / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^\s*from\s+__future__\s", text, re.M), name
        tree = ast.parse(text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert len(re.findall(r"^\s*(?:from|import)\s+\.\S*.*$", text, re.M)) == len(nodes)
        for node in nodes:
            assert node.level == 1 and node.module in before and node.col_offset == 0
            assert node.lineno == node.end_lineno, "a relative import must be on one line, so that it can be removed"
            assert all(alias.asname is None for alias in node.names)
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            defined = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            defined += [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            for what in defined:
                assert names.setdefault(what, name) == name, f"{what} is in {names[what]} and in {name}"
        before.add(name)
    assert len(names) > 50


# ---- Sizes and comments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", python_files("ddpm_pipeline", "training"))
def test_files_and_functions_are_short(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name != "ddpm_pipeline/scheduling_ddpm.py":
        assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            most = 180 if (name, node.name) == ("training/train.py", "main") else 120
            assert length <= most, f"{node.name} has {length} lines"
            assert not any(isinstance(part, ast.Nonlocal) for part in ast.walk(node)), node.name


@pytest.mark.parametrize("name", python_files("ddpm_pipeline", "training", "benchmarks", "examples"))
def test_type_errors_are_ignored_for_a_reason_only(name):
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if "type: ignore" in line:
            assert re.search(r"# type: ignore\[[\w, -]+\]  # \w+", line), line


def test_the_metaphor_of_the_walk_stays_in_docs_idea():
    """The metaphor lives in docs/idea.md, in one sentence of the package's docstring and in README's caption."""
    count = 0
    for name in project_files():
        content = (ROOT / name).read_bytes()
        if name == "docs/idea.md" or b"\0" in content or name == "tests/test_house.py":
            continue
        text = content.decode("utf-8").replace("os.walk", "").replace("ast.walk", "")
        count += len(re.findall(r"walk", text, re.I))
    assert count < 15


# ---- CONTRIBUTING.md and the other texts -----------------------------------------------------------------------------


def tree_of_contributing() -> list[str]:
    """The paths in the fenced block of CONTRIBUTING.md that lists ddpm_pipeline/.

    One line, one path: the first word, below the last folder (a name that ends in /) that is indented less.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    trees = [block for block in blocks if re.search(r"^\W*ddpm_pipeline/(\s|$)", block, re.M)]
    assert len(trees) == 1, f"CONTRIBUTING.md has {len(trees)} fenced blocks with a line for ddpm_pipeline/, not one"
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, trees[0].splitlines()):
        words = line.lstrip()
        column, path = len(line) - len(words), words.split()[0]
        while folders and folders[-1][0] >= column:
            folders.pop()
        if folders:
            path = folders[-1][1] + path
        if path.endswith("/"):
            folders.append((column, path))
        paths.append(path)
    return paths


def test_contributing_names_every_file_of_code_once():
    named = Counter(path for path in tree_of_contributing() if path.endswith(".py"))
    files = [name for name in python_files(*CODE, "docs", "examples") if not name.endswith("__init__.py")]
    assert files
    assert {name: named[name] for name in files if named[name] != 1} == {}


def test_contributing_names_only_what_exists():
    missing = [path for path in tree_of_contributing() if not any(ROOT.glob(path.rstrip("/")))]
    assert missing == []


def test_no_file_names_a_local_path_or_package_index():
    local = re.compile(
        r"(?<![\w./:~-])/(?:home|root|work|tmp|mnt|Users)/"  # a path on the machine it was written on
        r"|\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org)\b|--(?:extra-)?index-url"
    )
    files = project_files()
    assert "setup.cfg" in files
    for name in files:
        content = (ROOT / name).read_bytes()
        if b"\0" in content:
            continue  # not text
        if name.endswith(".py"):
            assert content.isascii(), name
        found = local.search(content.decode("utf-8"))
        assert found is None, f"{name}: {found}"


# ---- Packaging -------------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line)] == []
    versions: dict[str, str] = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    assert len(versions) == len(lines), "a name is pinned twice"
    return versions


def test_every_dependency_has_an_exact_version():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    groups = {**setup["options.extras_require"], "core": setup["options"]["install_requires"]}
    versions = pins()
    wanted = [Requirement(line) for group in groups.values() for line in group.split("\n") if line]
    ours = [requirement for requirement in wanted if requirement.name == setup["metadata"]["name"]]
    assert all(extra in groups for requirement in ours for extra in requirement.extras)
    for requirement in wanted:
        if requirement not in ours:
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, requirement
            assert requirement.specifier.contains(version), requirement


def core_modules() -> set[str]:
    """Top-level modules of the distributions that a plain install brings: the closure of the core requirements."""
    by_distribution: dict[str, set[str]] = {}
    for module, owners in packages_distributions().items():
        for owner in owners:
            by_distribution.setdefault(canonicalize_name(owner), set()).add(module)
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    pending = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line]
    seen: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        with contextlib.suppress(PackageNotFoundError):
            pending += [Requirement(line) for line in distribution(name).requires or []]
    return {module for name in seen for module in by_distribution.get(name, ())}


def test_every_module_of_the_wheel_imports_with_the_core_dependencies_alone(tmp_path):
    """The wheel is installed into an empty folder, and everything that no core dependency brings is blocked."""
    source = shutil.copytree(ROOT / "ddpm_pipeline", tmp_path / "source" / "ddpm_pipeline").parent
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, installed = tmp_path / "wheels", tmp_path / "installed"
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(wheel, check=True, capture_output=True)
    (file,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(file)], check=True)
    names = {name for name in (path.name for path in (installed / "ddpm_pipeline").iterdir()) if name[0] != "_"}
    assert "py.typed" in names
    for page in ("ddpm_pipeline/web", "ddpm_pipeline/demo"):
        files = [
            {path.relative_to(folder) for path in (folder / page).rglob("*.*") if path.suffix != ".pyc"}
            for folder in (source, installed)
        ]
        assert files[0] == files[1] and len(files[0]) > 5
    blocked = sorted(set(packages_distributions()) - core_modules() - {"ddpm_pipeline"})
    assert {"accelerate", "datasets", "matplotlib", "torchdiffeq", "scipy"} <= set(blocked)
    code = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({blocked!r})  # an import of these fails
sys.path.insert(0, {str(installed)!r})
import ddpm_pipeline
assert ddpm_pipeline.__file__.startswith({str(installed)!r}), ddpm_pipeline.__file__
for module in pkgutil.iter_modules(ddpm_pipeline.__path__):
    if module.name != "__main__":
        importlib.import_module(f"ddpm_pipeline.{{module.name}}")
print(ddpm_pipeline.__version__)
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert f"-{child.stdout.strip()}-" in file.name


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# ---- The model card --------------------------------------------------------------------------------------------------


def test_the_model_card_explains_the_source_of_each_field():
    text = (ROOT / "model_card.md").read_text(encoding="utf-8")
    (comment,) = re.findall(r"<!--.*?-->\n", text, re.S)
    explained = re.findall(r"^([a-z_]+): ", comment, re.M)
    assert "$" not in comment  # or the explanation is filled in as well
    used = set(re.findall(r"\$(\w+)", text))
    assert sorted(used) == sorted(explained)
    assert text.split("---\n")[1] == "$metadata\n"  # what is in it: tests/test_publishing.py
