"""Commands in child processes that know no other Hub than that of server.py."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(hub, home, command, *, token="tok-a", **variables):
    """Start Python with these arguments; `variables` are added to its environment."""
    environment = hub.environment(home, token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(hub, home, *command, timeout=300, **options):
    """Exit code, output and errors of a script in training/ with its arguments, or of Python with its options."""
    command = [ROOT / "training" / command[0] if command[0].endswith(".py") else command[0], *command[1:]]
    with start(hub, home, command, **options) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            child.kill()
    return child.returncode, out, err


def run_code(hub, home, code, *arguments, **options):
    """What a Python program prints as JSON in its last line."""
    returncode, out, err = run(hub, home, "-c", code, *arguments, **options)
    assert returncode == 0, err
    return json.loads(out.splitlines()[-1])
