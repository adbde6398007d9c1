"""EMA SNAPSHOTS: the averages of post_hoc_ema.py in a run, and their snapshots in RUN/ema/.

    ema/step-000500-0.05.safetensors  step-000500-0.10.safetensors  ...

A snapshot has the average of one length after one optimizer step, in fp16: it is written at every 1/64 of the run. fp16
has eight times as many steps between two powers of two as bf16, and the errors of reconstructed averages were an eighth
of those with bf16; weights are far from the ends of its range.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_pipeline.files import remove, replacing
from training.post_hoc_ema import PostHocEMA, Profile, gamma_of
from training.run import checkpoint

if TYPE_CHECKING:
    from training.ema import FlatEMA

T = TypeVar("T")

FOLDER = "ema"  # in the folder of a run
NAME = re.compile(r"step-(\d{6,})-(\d\.\d\d)\.safetensors")
NUMBER = 64  # of snapshots of each average in a run


class EMASnapshots:
    """The averages of post_hoc_ema in a run, the same on all ranks, and their snapshots.

    Args:
        enabled: False: there are none.
        ema: of the run.
        output_dir: of the run; None on all ranks but rank 0: nothing is written.
        tell: prints a line.
    """

    def __init__(self, enabled: bool, ema: FlatEMA, output_dir: Path | None, tell: Callable[[str], object]) -> None:
        self._averages = PostHocEMA(ema) if enabled else None
        self._folder, self._tell = None if output_dir is None else output_dir / FOLDER, tell
        self._parts = 0  # of NUMBER parts of the run that have their snapshots
        self._newest = 0  # step of the newest snapshot of this run, or of the checkpoint that it continues from

    @property
    def enabled(self) -> bool:
        """Whether there are averages; False also for a run that continues from a checkpoint without them."""
        return self._averages is not None

    def update(self, step: int, skip: Tensor) -> None:
        """After optimizer step `step`, and after the update of the EMA; `skip` as for that."""
        if self._averages is not None:
            self._averages.update(step, skip)

    def is_due(self, share: float) -> bool:
        """Whether snapshots are to be written when this share of the budget is used, in [0, 1]."""
        return self._averages is not None and _parts(share) > self._parts

    def write(self, step: int, share: float) -> None:
        """Write the snapshots of this step.

        Those of other runs in this folder, and of later steps than the checkpoint that this run continues from, are
        deleted before: they are averages of other weights.

        Raises:
            DiskFullError: they cannot be written.
        """
        assert self._averages is not None
        newest, self._newest, self._parts = self._newest, step, _parts(share)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(exist_ok=True)
            self._remove_after(newest)
            for length, weights in self._averages.state_dicts().items():
                path = self._folder / f"step-{step:06d}-{length:.2f}.safetensors"
                with replacing(path) as temporary:
                    save_file({name: tensor.half() for name, tensor in weights.items()}, temporary)
        except (OSError, SafetensorError) as error:
            advice = "checkpoints are untouched: make room, then --resume_from_checkpoint latest"
            raise checkpoint.disk_full(self._folder, error, self.bytes_to_come(), advice) from error

    def remove_earlier(self) -> None:
        """After a checkpoint of a new run: without averages of its own, it leaves no snapshots of an earlier one."""
        if self._folder is not None and self._averages is None and self._newest == 0:
            with contextlib.suppress(OSError):  # they take room, but choose_ema.py does not use them
                self._remove_after(0)

    def _remove_after(self, step: int) -> None:
        """Delete the snapshots of later steps, and what a killed run has left half written."""
        assert self._folder is not None
        later = [path for path, of_step, _ in _files(self._folder) if of_step > step]
        for path in [*later, *self._folder.glob(".step-*")]:
            remove(path)

    def bytes_to_come(self) -> int:
        """Of the snapshots that the rest of the run writes, at most."""
        return 0 if self._averages is None else (NUMBER - self._parts) * 2 * self._averages.numel

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """The averages for a checkpoint, by the names of their files."""
        if self._averages is None:
            return {}
        return {checkpoint.AVERAGES[length]: weights for length, weights in self._averages.state_dicts().items()}

    def load_state(self, weights: Mapping[str, Mapping[str, Tensor]], step: int, share: float) -> None:
        """Continue from a checkpoint.

        Args:
            weights: what `state_dicts` was, among others.
            share: of the budget that is used at its step.
        """
        found = {length: weights[name] for length, name in checkpoint.AVERAGES.items() if name in weights}
        self._newest = step
        if self._averages is None:
            if found:
                self._tell("WARNING: post_hoc_ema True -> False: no more snapshots of its averages are written, and no "
                           "length can be chosen after training")  # fmt: skip
        elif len(found) < len(checkpoint.AVERAGES):
            self._tell("WARNING: post_hoc_ema is true, but the checkpoint is without its averages, which begin with "
                       "the first step: none are kept, and no length can be chosen after training")  # fmt: skip
            self._averages = None
        else:
            self._averages.load_state_dicts(found)
            # a run that was stopped, and ends here with another limit, has no snapshots of this step yet
            self._parts = min(NUMBER - 1, _parts(share))


def list_snapshots(run: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[Profile, Callable[[], dict[str, Tensor]]]:
    """For each snapshot of a run, in order, what reads it.

    Args:
        shapes: of the parameters of its network, by name.
    Raises:
        ValueError: there are none; or one is damaged, or of another network.
    """
    found = {Profile(gamma_of(length), step): path for path, step, length in _files(run / FOLDER)}
    if not found:
        raise ValueError(f"{run / FOLDER} has no snapshots of averages: they come from train.py --post_hoc_ema")
    for path in found.values():
        _check_shapes(path, shapes)
    return {profile: partial(_read, path, load_file) for profile, path in found.items()}


def _check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    from ddpm_pipeline.loading import safetensors_headers  # imports diffusers: not before it is needed

    found = {name: shape for name, (shape, _) in _read(path, safetensors_headers).items()}
    for name in sorted(found.keys() | expected.keys()):
        shape, wanted = found.get(name), expected.get(name)
        if shape != wanted:
            raise ValueError(f"{path} is not of this network: {name} has the shape {shape}, in the model {wanted}")


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """Path, step and length of each snapshot in a folder, in order."""
    matches = [(path, NAME.fullmatch(path.name)) for path in folder.glob("step-*")]
    return sorted((path, int(match[1]), float(match[2])) for path, match in matches if match and int(match[1]))


def _read(path: Path, read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    try:
        return read(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _parts(share: float) -> int:
    return math.floor(NUMBER * share + 1e-9)  # up to rounding
