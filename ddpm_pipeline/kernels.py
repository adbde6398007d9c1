"""KERNELS: loops in C, made into a library by the machine's C compiler when they are first needed.

That takes a few seconds, and the library is kept in the user's cache, one for each processor. It works on Linux with a
compiler named `cc` (or as CC says) and with a torch that uses GNU OpenMP, as those from PyPI do. Everything else, and
every failure, means that torch computes instead; nothing depends on a kernel but the time.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .files import replacing

SOURCE = Path(__file__).with_name("group_norm.c")
CACHE = Path("~/.cache/ddpm_pipeline/kernels").expanduser()
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-fPIC")
VARIABLE = "DDPM_PIPELINE_KERNELS"  # 0: without them


class Shape(ctypes.Structure):
    """The struct of the same name in group_norm.c."""

    _fields_ = (
        ("images", ctypes.c_long),
        ("pixels", ctypes.c_long),
        ("channels", ctypes.c_long),
        ("groups", ctypes.c_long),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int),
        ("bf16", ctypes.c_int),
        ("kept", ctypes.c_float),
        ("dropped", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
    )


def group_norm_kernel() -> Any:
    """The functions of group_norm.c and their `Shape`, as a ctypes library; None where it cannot be compiled."""
    return load()[0]


@functools.cache
def load() -> tuple[Any, str | None]:
    """The library, or None and the reason."""
    if os.environ.get(VARIABLE, "1") == "0":
        return None, f"{VARIABLE} is 0"
    compiler, openmp = shutil.which(os.environ.get("CC") or "cc"), _openmp_of_torch()
    if openmp is None:
        return None, "torch does not use GNU OpenMP here"
    if compiler is None:
        return None, "there is no C compiler"
    try:
        path = _path_for(compiler, openmp)
        with contextlib.suppress(OSError, AttributeError):  # not compiled yet, or damaged on the disk: compiled anew
            return _opened(path), None
        return _compiled(compiler, openmp, path), None
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        return None, f"{compiler} failed: {getattr(error, 'stderr', None) or error}"


def _opened(path: Path) -> Any:
    """The library of a file. Raises OSError where it is none, and AttributeError where a function is missing."""
    library = ctypes.CDLL(str(path))
    library.group_norm_segments.argtypes = [ctypes.c_long]
    library.group_norm_segments.restype = ctypes.c_long
    library.group_norm_forward.argtypes = [Shape, *[ctypes.c_void_p] * 7]
    library.group_norm_backward.argtypes = [Shape, *[ctypes.c_void_p] * 12]
    library.Shape = Shape  # type: ignore[attr-defined]  # a ctypes library takes any attribute
    return library


def processor() -> str:
    """The kind of processor and its instruction sets, as far as the system tells."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux
        cpuinfo = platform.processor()
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", cpuinfo, re.MULTILINE)
    return "\n".join([platform.machine(), *sorted(set(lines))])


def _path_for(compiler: str, openmp: str) -> Path:
    """Where the library is kept that this compiler makes for this processor."""
    parts = (SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, openmp, processor())
    return CACHE / f"group_norm-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def _compiled(compiler: str, openmp: str, path: Path) -> Any:
    """The library, compiled; it is kept at `path` when it has been opened."""
    CACHE.mkdir(parents=True, exist_ok=True)
    # The processes of a run compile at the same time: each in files of its own.
    with replacing(path) as library, tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "group_norm.o"
        # In two steps: linked with -fopenmp it would get a second OpenMP, whose threads compete with torch's.
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), openmp, "-lm", "-o", str(library)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return _opened(library)


def _openmp_of_torch() -> str | None:
    """The GNU OpenMP library that torch has loaded into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return None
    found = re.search(r"(/\S*libgomp\S*)$", maps, re.MULTILINE)
    return found[1] if found else None
