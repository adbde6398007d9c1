"""Several machines under torchrun: its agents and its rendezvous, on a network, with folders of their own.

A machine is a network namespace where the system has them, and an address of the loopback elsewhere.
"""

import contextlib
import os
import shutil
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import network
from tests.faults.child import Node
from tests.faults.conftest import Workspace
from training.run import checkpoint

FULL = os.environ.get("DDPM_FAULTS") == "full"  # see test_killed.py
SECONDS = 60  # within which all must have ended


class Nodes:
    """Two machines of a run; `start` starts its processes on them.

    Args:
        machines: network namespaces, or [None, None] for the loopback.
        addresses: torchrun makes the first in alphabetical order rank 0.
    """

    def __init__(self, workspace, machines, addresses):
        self.workspace, self.machines, self.addresses = workspace, machines, addresses
        self.started, self.log = [], workspace.folder / "log"
        self.folders = [workspace.folder / name for name in ("a", "b")]
        for folder in self.folders:
            shutil.copytree(workspace.data / "images", folder / "images")

    def start(self, nnodes, per_node, *, fault=None, max_restarts=3, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log.write_text("")
        nodes = []
        for i, (machine, address, folder) in enumerate(zip(self.machines, self.addresses, self.folders)):
            launcher = [f"--nnodes={nnodes}", f"--nproc-per-node={per_node}", "--rdzv-backend=c10d", "--rdzv-id=test"]
            launcher += [
                f"--rdzv-endpoint={self.addresses[0]}:{port}",
                f"--local-addr={address}",
                f"--max-restarts={max_restarts}",
            ]
            # a machine is dead after five seconds, and then the others wait for it for eight
            patience = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=8"
            launcher += [f"--rdzv-conf=is_host={1 - i},{patience}"]
            paths = {"output_dir": folder / "run", "cache_dir": folder / "cache", "train_data_dir": folder / "images"}
            settings = {"train_batch_size": "auto", "global_batch_size": 4, "resume_from_checkpoint": "auto"}
            arguments = self.workspace.arguments("run", **(settings | paths | options))
            nodes.append(Node(launcher, arguments, self.log, machine=machine, fault=fault))
        self.started += nodes
        return nodes

    def text(self):
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def wait_for(self, text, seconds=150):
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text()}"
            time.sleep(0.01)

    def weights(self):
        path, _ = checkpoint.find(self.folders[0] / "run", "latest")
        assert path.name == "checkpoint-000006"
        assert not (self.folders[1] / "run").exists()
        return [load_file(path / name) for name in (checkpoint.WEIGHTS, checkpoint.EMA)]


BOTH = ["loopback", "namespaces"]
ON_BOTH = pytest.mark.parametrize("nodes", BOTH, indirect=True)
ON_LOOPBACK = pytest.mark.parametrize("nodes", BOTH if FULL else ["loopback"], indirect=True)
ON_NAMESPACES = pytest.mark.parametrize("nodes", BOTH if FULL else ["namespaces"], indirect=True)


@pytest.fixture
def nodes(request, workspace):
    with contextlib.ExitStack() as stack:
        machines, addresses = [None, None], ["127.0.0.1", "127.0.0.2"]
        if request.param == "namespaces":
            try:
                machines = stack.enter_context(network.two_machines())
            except OSError as error:
                pytest.skip(f"no network namespaces here: {error}")
            addresses = [machine.address for machine in machines]
        nodes = Nodes(workspace, machines, addresses)
        yield nodes
        for node in nodes.started:
            node.kill()


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory, data):
    """Weights and EMA of an undisturbed run of one process."""
    workspace = Workspace(tmp_path_factory.mktemp("one"), data)
    workspace.finish("one")
    path, _ = checkpoint.find(workspace.folder / "one", "latest")
    return [load_file(path / name) for name in (checkpoint.WEIGHTS, checkpoint.EMA)]


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@ON_LOOPBACK
@pytest.mark.parametrize("per_node", [1, 2] if FULL else [1])
def test_the_others_go_on_without_a_machine_that_is_gone_for_good(nodes, of_one_process, per_node):
    """torchrun --nnodes 1:2, with the global batch of before."""
    first, second = nodes.start("1:2", per_node, fault="slow_steps")
    nodes.wait_for(f"[step 3 on rank {2 * per_node - 1}]")
    second.kill()
    assert first.wait() == 0, nodes.text()
    assert "after step 2" in nodes.text()
    assert_close(nodes.weights(), of_one_process)


@ON_BOTH
@pytest.mark.parametrize("per_node", [1, 2] if FULL else [1])
def test_a_run_of_two_machines_goes_on_after_one_was_killed(nodes, of_one_process, per_node):
    """torchrun --nnodes 2, started again on both."""
    first, second = nodes.start(2, per_node, fault="slow_steps", max_restarts=0)
    nodes.wait_for(f"[step 3 on rank {2 * per_node - 1}]")
    second.kill()
    assert first.wait(SECONDS) == 1, nodes.text()
    first, second = nodes.start(2, per_node)
    assert (first.wait(), second.wait()) == (0, 0), nodes.text()
    assert "after step 2" in nodes.text()
    assert_close(nodes.weights(), of_one_process)


@ON_NAMESPACES
def test_other_images_on_one_machine_end_all_in_seconds(nodes):
    (nodes.folders[1] / "images" / "3.png").write_bytes((nodes.folders[1] / "images" / "4.png").read_bytes())
    first, second = nodes.start(2, 1, max_restarts=0)
    assert (first.wait(SECONDS), second.wait(SECONDS)) == (1, 1), nodes.text()
    lines = nodes.text().split("train.py: ")[1:]  # two processes may write on one line
    assert len(lines) == 2 and all("sha256 of the images: " in line for line in lines), nodes.text()
    assert all("rank 1 on node 1 (" in line for line in lines), nodes.text()


@ON_LOOPBACK
def test_processes_that_do_not_divide_the_global_batch_are_refused(nodes):
    first, second = nodes.start(2, 1, max_restarts=0, global_batch_size=5)
    assert (first.wait(SECONDS), second.wait(SECONDS)) == (1, 1), nodes.text()
    message = "global_batch_size is 5 and train_batch_size is auto: 2 processes do not divide that; start 1, 5, or give"
    assert nodes.text().count(message) == 2, nodes.text()
