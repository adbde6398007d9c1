"""Commands in child processes that know no other Hub than that of server.py."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLISH = """
import contextlib, io, json, os, sys
from training.hub import files, push
from training.publish import main

checked = {}
def check_once(folder, check_loading=push.check_loading):  # the same model need not be checked again
    model = tuple((folder / name).read_bytes() for name in files.MODEL_FILES)
    if model not in checked:
        checked[model] = check_loading(folder)
    return checked[model]
push.check_loading = check_once if sys.argv[2] == "checked" else lambda folder: {}

results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results), flush=True)
os._exit(0)
"""


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


def publish_all(hub, home, commands, *, checked=True):
    """Exit code, output and errors of publish.py with each of these arguments, one after the other in one process.

    `checked`: whether it is checked, as always, that the model loads in three ways.
    """
    return run_code(hub, home, PUBLISH, json.dumps(commands), "checked" if checked else "unchecked")
