"""Twenty visitors of the demo at once, on the loopback: `python benchmarks/demo.py MODEL`

The demo runs in a process of its own. Each visitor opens the page and has images generated, or uploads one and has
half of it repaired, again and again with other seeds; what the page shows must be, pixel by pixel, what the pipeline
gives here. The memory of the server is read every second. Writes benchmarks/results/demo-NAME.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import psutil
from PIL import Image

from benchmarks.common import RESULTS, ROOT, file_name, machine, write_json
from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.pixels import height_width

STEPS = 5
NUMBER = 2  # images of a job
SEEDS = 40  # different jobs of a kind
SETTLED = 60  # seconds after which memory should not grow


class Visitor:
    """A visit to the page: what a browser requests."""

    def __init__(self, address: str) -> None:
        self.address, self.session = address.rstrip("/"), uuid.uuid4().hex
        self._open("/").read()
        config = json.load(self._open("/config"))
        self._jobs = {job["api_name"]: job["id"] for job in config["dependencies"]}

    def run(self, name: str, *inputs: Any) -> Any:
        """What the page shows after a click on the button of this job, of a function in ddpm_pipeline/demo/page.py.

        Raises:
            RuntimeError: the job failed.
        """
        job = {"data": inputs, "fn_index": self._jobs[name], "session_hash": self.session}
        self._open("/gradio_api/queue/join", json.dumps(job).encode(), "application/json").read()
        shown: Any = None
        for line in self._open(f"/gradio_api/queue/data?session_hash={self.session}"):
            message = json.loads(line.removeprefix(b"data: ") or "null") if line.startswith(b"data: ") else {}
            output = message.get("output") or {}
            if message.get("msg") == "process_generating":
                (value,) = output["data"]
                shown = value if shown is None else _changed(shown, value)
            elif message.get("msg") == "process_completed":
                if not message["success"]:
                    raise RuntimeError(output.get("error"))
                (value,) = output["data"]
                return shown if shown is not None else value
        raise RuntimeError("the page gave no answer")

    def upload(self, payload: bytes) -> dict[str, Any]:
        """The value of an input after an image file was dropped on it."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="image.png"\r\n\r\n'
        body = head.encode() + payload + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        (path,) = json.load(self._open("/gradio_api/upload", body, kind))
        return {"path": path, "orig_name": "image.png", "meta": {"_type": "gradio.FileData"}}

    def _open(self, path: str, body: bytes | None = None, kind: str = "") -> Any:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if kind else {})
        return urllib.request.urlopen(request, timeout=600)


def _changed(shown: str, edits: list[Any]) -> str:
    """A text after the edits that gradio sends instead of the new text."""
    for kind, path, value in edits:
        assert path == [] and kind in ("append", "replace"), (kind, path)
        shown = shown + value if kind == "append" else value
    return shown


def pictures(shown: str) -> list[Image.Image]:
    """The PNG files that the page offers for download."""
    files = re.findall(r'<a href="data:image/png;base64,([^"]+)"', shown)
    return [Image.open(io.BytesIO(base64.b64decode(file))) for file in files]


class Load:
    """Visitors who come one after the other in each of several threads, until a time; what they saw."""

    def __init__(self, address: str, pipe: Any, until: float) -> None:
        self.address, self.pipe, self.until = address, pipe, until
        self.height, self.width = height_width(pipe.unet.config["sample_size"])
        self.mask = np.zeros((self.height, self.width), bool)
        self.mask[:, : self.width // 2] = True
        self.expected: dict[tuple[str, int], list[Image.Image]] = {}
        for name in ("generate", "repair"):  # what is repaired is generated first
            for seed in range(SEEDS):
                self.expected[name, seed] = self._expected(name, seed)
        self.seen: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.errors: list[str] = []

    def visit(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.until:
            name, seed = chance.choice(("generate", "generate", "generate", "repair")), chance.randrange(SEEDS)
            started = time.monotonic()
            try:
                shown = pictures(self._visit(name, seed))
                pairs = zip(shown, self.expected[name, seed])
                right = len(shown) == NUMBER and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
                self.seen["right" if right else "wrong"] += 1
                self.seconds.append(time.monotonic() - started)
            except (OSError, RuntimeError) as error:
                self.seen["failed"] += 1
                self.errors.append(f"{name} {seed}: {error!r}")

    def _visit(self, name: str, seed: int) -> str:
        visitor = Visitor(self.address)
        settings = [seed, STEPS, 0, 1, 1]
        if name == "generate":
            return visitor.run("generate", NUMBER, 1, -1, *settings)
        file = visitor.upload(self._uploaded(seed))
        visitor.run("show", file)
        bits = "".join("01"[bit] for bit in self.mask.ravel().astype(int))
        return visitor.run("repair", file, bits, NUMBER, *settings)

    def _uploaded(self, seed: int) -> bytes:
        file = io.BytesIO()
        self.expected["generate", seed][0].save(file, "PNG")
        return file.getvalue()

    def _expected(self, name: str, seed: int) -> list[Image.Image]:
        arguments = {"seeds": [*range(seed, seed + NUMBER)], "num_inference_steps": STEPS}
        if name == "generate":
            return self.pipe(**arguments, calibrated=False).images
        return self.pipe.inpaint(self.expected["generate", seed][0], self.mask, **arguments).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a saved pipeline without classes")
    parser.add_argument("--visitors", type=int, default=20, help="at once; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    args = parser.parse_args()

    pipe: Any = DDPMPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    command = [sys.executable, "-m", "ddpm_pipeline", "demo", args.model, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(line.split()[-1] for line in server.stdout if "http://" in line)
            threading.Thread(target=server.stdout.read, daemon=True).start()  # so that it can print more
            result = machine() | measure(address, pipe, server.pid, args.visitors, args.minutes)
        finally:
            server.terminate()
    result["model"] = Path(args.model).resolve().parent.name
    write_json(args.output or RESULTS / f"demo-{file_name(result['processor'])}-{result['cores']}-cores.json", result)
    print(json.dumps({name: value for name, value in result.items() if name not in machine()}, indent=2))
    if result["wrong"] or result["failed"]:
        sys.exit(1)


def measure(address: str, pipe: Any, server: int, visitors: int, minutes: float) -> dict[str, Any]:
    """What the visitors saw, and the server's memory in MB from minute to minute."""
    load = Load(address, pipe, until=float("inf"))  # computes what it expects before the time starts
    started = time.monotonic()
    load.until = started + 60 * minutes
    threads = [threading.Thread(target=load.visit, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    process, memory = psutil.Process(server), []
    while any(thread.is_alive() for thread in threads):
        memory.append(process.memory_info().rss / 1e6)
        time.sleep(1)
    return {
        "visitors": visitors,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "jobs": sum(load.seen.values()),
        **{what: load.seen[what] for what in ("right", "wrong", "failed")},
        "errors": load.errors[:10],
        "seconds_of_a_job": {"median": round(median(load.seconds), 1), "most": round(max(load.seconds), 1)},
        "load": round(os.getloadavg()[1], 1),  # of the machine, with all else that runs on it
        "memory_mb": [round(mb) for mb in memory[::SETTLED]] + [round(memory[-1])],
    }


if __name__ == "__main__":
    main()
