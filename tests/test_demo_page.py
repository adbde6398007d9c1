"""The server of the demo over HTTP, without a browser: visitors at once, limits, files and paths of the machine."""

import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models import tiny_pipe

pytest.importorskip("gradio", reason="needs gradio, of the extra demo")

from benchmarks.demo import Visitor, pictures
from ddpm_pipeline.demo import gate, jobs, page

FOUR_STEPS = [0, 4, 0, 1, 1]  # seed, steps, class, guidance, autoguidance


@pytest.fixture(scope="module")
def model():
    return jobs.Model(tiny_pipe(), "user/model")


@pytest.fixture(scope="module")
def address(model):
    with page.serving(model) as served:
        yield served.local_url.rstrip("/")


def png(value=100, size=(8, 8)):
    file = io.BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def bytes_of_a_bomb():
    """A PNG file whose header says 30,000 x 30,000 pixels."""
    content = bytearray(png())
    content[16:24] = (30_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    return bytes(content)


def status(address, path, body=None, **headers):
    """The status of a request, and the text of the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def announce(address, length):
    """The status of an upload of so many bytes, before they are sent; None: of a length that is not said."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader(*(("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))))
    connection.endheaders()
    return connection.getresponse().status


def join(address, visitor, name, *inputs):
    job = {"data": inputs, "fn_index": visitor._jobs[name], "session_hash": visitor.session}
    return status(address, "/gradio_api/queue/join", json.dumps(job).encode(), **{"Content-Type": "application/json"})


def test_visitors_at_once_get_their_own_images(address):
    """Some have images generated, others what they uploaded repaired."""
    shown = {}

    def visit(seed):
        visitor = Visitor(address)
        if seed % 2:
            shown[seed] = visitor.run("generate", 2, 0.5, -1, seed, 4, 0, 1, 1)
        else:
            shown[seed] = visitor.run("repair", visitor.upload(png(seed)), "1" * 32 + "0" * 32, 2, seed, 4, 0, 1, 1)

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in range(10, 110, 11)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    mask = np.arange(64).reshape(8, 8) < 32
    for seed, html in shown.items():
        seeds = {"seeds": [seed, seed + 1], "num_inference_steps": 4}
        image = Image.new("L", (8, 8), seed)
        expected = tiny_pipe()(**seeds, eta=0.5) if seed % 2 else tiny_pipe().inpaint(image, mask, **seeds)
        assert all(map(np.array_equal, pictures(html), expected.images)) and len(pictures(html)) == 2
        assert [picture.text["seed"] for picture in pictures(html)] == [str(seed), str(seed + 1)]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/runs",
        "/gradio_api/info",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/proxy=http://127.0.0.1:9/",
        "/gradio_api/file=http://127.0.0.1:9/",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file={folder}/../../etc/passwd",
        "/gradio_api/file=setup.cfg",
        "/gradio_api/file=/%00",
        f"/gradio_api/file=/{'a' * 300}",
        "/monitoring",
        "/docs",
    ],
)
def test_nothing_is_answered_that_the_page_does_not_ask_for(address, path):
    folder = os.environ["GRADIO_TEMP_DIR"]
    assert status(address, path.format(folder=folder)) == (404, "Not Found")


def test_nothing_shows_a_path_of_the_machine(address):
    for path in ("/", "/config"):
        code, text = status(address, path)
        assert code == 200 and not any(
            word in text for word in (str(Path.cwd()), str(Path.home()) + "/", "site-packages")
        )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "setup.cfg",
        "http://127.0.0.1:9/x.png",
        "{folder}/../passwd",
        ["{folder}"],
        "{folder}",
        "{folder}/away.png",
        "/a\0b",
        "/\ud800",
        None,
    ],
)
def test_a_job_takes_no_other_files_than_uploads(address, path):
    """Nor does gradio fetch one from an address."""
    path = path.format(folder=os.environ["GRADIO_TEMP_DIR"]) if isinstance(path, str) else path
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for value in (file, [file], {"a": [file]}):
        assert join(address, Visitor(address), "show", value)[0] == 400
    assert status(address, "/gradio_api/queue/join", b"{", **{"Content-Type": "application/json"})[0] == 400


def test_what_is_too_large_is_refused(address, monkeypatch):
    visitor = Visitor(address)
    assert join(address, visitor, "repair", None, "0" * gate.MAX_JOB_BYTES)[0] == 413
    assert announce(address, jobs.MAX_UPLOAD_BYTES + 2**13) == announce(address, None) == 413
    monkeypatch.setattr(gate, "MAX_FOLDER_BYTES", 1000)
    assert announce(address, 1001) == 507


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "the image cannot be read: not an image in a known format"),
        (bytes_of_a_bomb(), "the image cannot be read: give at most 16777216 pixels"),
        (png(size=(4097, 4097)), "the image cannot be read: 4097 x 4097 pixels: give at most 16777216 in all"),
    ],
)
def test_uploads_that_cannot_be_read(address, payload, message):
    visitor = Visitor(address)
    with pytest.raises(RuntimeError) as error:
        visitor.run("repair", visitor.upload(payload), "1" * 64, 1, *FOUR_STEPS)
    assert str(error.value) == message


def test_errors_of_the_server_are_not_shown(address, model, monkeypatch, capfd):
    def generate(*args):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(RuntimeError, match=r"^None$"):
        Visitor(address).run("generate", 1, 1, -1, *FOUR_STEPS)
    assert "/secret/path" in capfd.readouterr().err


def test_a_job_ends_when_its_time_is_up(address, model, monkeypatch):
    monkeypatch.setattr(model, "time_limit", -1.0)
    with pytest.raises(RuntimeError, match="took longer than -1 seconds"):
        Visitor(address).run("generate", 1, 1, -1, *FOUR_STEPS)


def test_one_job_runs_and_the_queue_is_bounded(address, model, monkeypatch):
    running, go = [], threading.Event()

    def generate(*args):
        running.append(args)
        go.wait(30)
        yield []

    monkeypatch.setattr(model, "generate", generate)
    visitor = Visitor(address)
    codes = []
    while len(codes) < 1 or not running:  # the first one leaves the queue
        codes.append(join(address, visitor, "generate", 1, 1, -1, *FOUR_STEPS)[0]) if not codes else time.sleep(0.01)
    codes += [join(address, visitor, "generate", 1, 1, -1, *FOUR_STEPS)[0] for _ in range(page.MAX_WAITING + 1)]
    assert codes == [200] * (page.MAX_WAITING + 1) + [503] and len(running) == 1
    go.set()


def test_an_empty_seed_is_named(address):
    with pytest.raises(RuntimeError, match="The seed is empty"):
        Visitor(address).run("generate", 1, 0, -1, None, *FOUR_STEPS[1:])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([0, 1, -1, *FOUR_STEPS], "number is 0: give an integer from 1 to 16"),
        ([1, 2, -1, *FOUR_STEPS], "eta is 2: give a number from 0 to 1"),
        ([1, "x", -1, *FOUR_STEPS], "eta is 'x': give a number from 0 to 1"),
        ([1, 1, 7, *FOUR_STEPS], "calibrated is 7: give an integer from -1 to -1"),
        ([1, 1, -1, -3, 4, 0, 1, 1], "seed is -3: give an integer from 0 to"),
        ([1, 1, -1, 1.5, 4, 0, 1, 1], "seed is 1.5: give an integer from 0 to"),
        ([1, 1, -1, 0, 21, 0, 1, 1], "steps is 21: give an integer from 1 to 20"),
        ([1, 1, -1, 0, [], 0, 1, 1], r"steps is \[\]: give an integer from 1 to 20"),
        ([1, 1, -1, "<b>" * 999, 4, 0, 1, 1], r"seed is '(&lt;b&gt;)+&lt;b?.{0,5}$"),
    ],
)
def test_numbers_that_are_wrong_are_named(address, capfd, inputs, message):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        Visitor(address).run("generate", *inputs)
    assert "Traceback" not in capfd.readouterr().err


def test_the_seed_of_a_drawn_image_is_named(address, capfd):
    with pytest.raises(RuntimeError, match=r"^seed is -1: give an integer from 0 to"):
        Visitor(address).run("draw", -1)
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_that_is_taken_is_named(address, model):
    port = int(address.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"host and port are 127.0.0.1 and {port}: Address already in use"):
        page.serving(model, port=port).__enter__()


def test_uploads_are_deleted_at_the_end():
    with page.serving(jobs.Model(tiny_pipe(), "user/model")) as served:
        path = Path(Visitor(served.local_url).upload(png())["path"])
        assert path.is_file()
    assert not path.is_file() and not Path(os.environ["GRADIO_TEMP_DIR"]).exists()
