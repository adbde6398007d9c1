"""Two machines that train together over networks of several speeds: `python benchmarks/nodes.py`

The machines are network namespaces on this one (see network.py), with a process each; Linux and root only. For each
speed a training pass of a family is timed

    alone       without an exchange of gradients,
    exchange    the exchange of as many bytes, without a pass,
    float32     as training/train.py does, which exchanges gradients while others are computed,
    bf16        with --gradient_compression bf16,
    1 MB        as float32, with buckets of 1 MB instead of DDP's 25,

in alternation, so that other load affects all alike. `hidden` is the share of the exchange that costs no time,
1 - (float32 - alone) / exchange. Takes about three minutes, and writes benchmarks/results/nodes-NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks import network
from benchmarks.common import RESULTS, file_name, machine, minutes_since, write_json
from benchmarks.compare import three_digits
from benchmarks.network import Machine
from benchmarks.networks import make_network
from training.run import gradients

SIDE = 32  # pixels
PORT = 29500  # free in a new namespace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="tiny", help="network; default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="images of a pass on each machine; default: %(default)s")
    parser.add_argument("--megabits", type=int, nargs="+", default=[1000, 100], help="per second; default: 1000 100")
    parser.add_argument("--rounds", type=int, default=9, help="passes of each kind; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    args = parser.parse_args()

    started, result = time.monotonic(), machine()
    rows: multiprocessing.Queue[list[dict[str, Any]]] = multiprocessing.Queue()
    with network.two_machines() as machines:
        settings = args.family, args.batch, args.megabits, args.rounds
        processes = [
            multiprocessing.get_context("fork").Process(target=work, args=(rank, machines, rows, *settings))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("a process failed: see above")
        measured = rows.get()
    result |= {"family": args.family, "batch": args.batch, "rows": measured, "load": three_digits(os.getloadavg()[1])}
    result["minutes"] = minutes_since(started)
    write_json(args.output or RESULTS / f"nodes-{file_name(result['processor'])}-{result['cores']}-cores.json", result)
    for row in measured:
        print(describe(row))


def work(
    rank: int,
    machines: tuple[Machine, Machine],
    rows: multiprocessing.Queue[list[dict[str, Any]]],
    family: str,
    batch: int,
    speeds: list[int],
    rounds: int,
) -> None:
    """The process of one machine; that of the first measures."""
    network.enter(machines[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = network.CABLE
    torch.set_num_threads(1)
    address = f"tcp://{machines[0].address}:{PORT}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    kinds = passes(family, batch)
    found = []
    for megabits in speeds:
        distributed.barrier()
        if rank == 0:
            for each in machines:
                network.set_rate(each, megabits)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        sent: dict[str, int] = {}
        for _ in range(1 + rounds):  # the first one only settles the buckets
            for name, run in kinds.items():
                distributed.barrier()
                before, start = bytes_sent(), time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                sent[name] = bytes_sent() - before
        medians = {name: median(times[1:]) for name, times in seconds.items()}
        found.append(
            {
                "megabits": megabits,
                "megabytes_sent": {name: three_digits(number / 1e6) for name, number in sent.items()},
                "seconds": {name: three_digits(value) for name, value in medians.items()},
                "hidden": {
                    name: three_digits(1 - (medians[name] - medians["alone"]) / medians["exchange"])
                    for name in ("float32", "1 MB")
                },
                "bf16_times_as_fast": three_digits(
                    median(a / b for a, b in zip(seconds["float32"][1:], seconds["bf16"][1:]))
                ),
            }
        )
    if rank == 0:
        rows.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


def passes(family: str, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed, by its name: forward and backward pass of so many random images, and an exchange of gradients."""
    torch.manual_seed(0)
    unet = make_network(family, SIDE)
    x_t, t = torch.randn(batch, 3, SIDE, SIDE), torch.randint(1000, (batch,))

    def train(model: Any) -> Callable[[], None]:
        def run() -> None:
            model(x_t, t, return_dict=False)[0].square().mean().backward()
            model.zero_grad()

        return run

    def wrap(**options: Any) -> DistributedDataParallel:  # a copy: the exchange is part of the parameters' gradients
        return DistributedDataParallel(copy.deepcopy(unet), **(gradients.ddp_settings().to_kwargs() | options))

    gradient, compressed = torch.zeros(unet.num_parameters()), wrap()
    gradients.compress(compressed)
    return {
        "alone": train(unet),
        "exchange": lambda: distributed.all_reduce(gradient),
        "float32": train(wrap()),
        "bf16": train(compressed),
        "1 MB": train(wrap(bucket_cap_mb=1)),
    }


def bytes_sent() -> int:
    """Bytes that this machine has put on the cable, with all headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == network.CABLE:
            return int(numbers.split()[8])
    raise OSError(f"no interface {network.CABLE}")


def describe(row: dict[str, Any]) -> str:
    seconds, sent, hidden = row["seconds"], row["megabytes_sent"], row["hidden"]
    times = ", ".join(f"{name} {value}" for name, value in seconds.items())
    return (
        f"{row['megabits']} Mbit/s: seconds {times}; MB sent float32 {sent['float32']}, bf16 {sent['bf16']}; "
        f"hidden {hidden['float32']} (1 MB: {hidden['1 MB']}); bf16 {row['bf16_times_as_fast']} times as fast"
    )


if __name__ == "__main__":
    main()
