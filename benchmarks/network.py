"""NETWORK: two machines on one: network namespaces of Linux with a cable between them. Needs root and `ip`.

A process that has entered a namespace, and its children, have one network interface besides their own loopback: that
end of the cable. They share the disk, so each machine needs folders of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

CABLE = "cable"  # the name of the interface in each namespace
CLONE_NEWNET = 0x40000000  # of <linux/sched.h>


class Machine(NamedTuple):
    """A network namespace and its address on the cable."""

    namespace: str
    address: str


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two namespaces with a cable, which are gone at the end.

    Raises:
        OSError: they cannot be made here; the message says why.
    """
    machines = tuple(Machine(f"ddpm-{os.getpid()}-{i}", f"10.77.0.{i}") for i in (1, 2))
    first, second = machines
    with contextlib.ExitStack() as stack:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
            stack.callback(_ip, "netns", "delete", machine.namespace)
        _ip("-n", first.namespace, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE,
            "netns", second.namespace)  # fmt: skip
        for machine in machines:
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", CABLE)
            for interface in (CABLE, "lo"):
                _ip("-n", machine.namespace, "link", "set", interface, "up")
        yield first, second


def set_rate(machine: Machine, megabits: int) -> None:
    """Let the machine send at most so many megabits (10^6) a second. Raises OSError without `tc` and its tbf."""
    _call("tc", "-n", machine.namespace, "qdisc", "replace", "dev", CABLE, "root", "tbf",
          "rate", f"{megabits}mbit", "burst", "64kb", "latency", "100ms")  # fmt: skip


def enter(machine: Machine) -> None:
    """Move this process to the machine, as `ip netns exec` would. It must have one thread. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{machine.namespace}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {machine.namespace}")


def _ip(*arguments: str) -> str:
    return _call("ip", *arguments)


def _call(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(command)}: {error.stderr.strip()}") from None
