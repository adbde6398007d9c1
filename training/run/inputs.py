"""INPUTS: the images of a run, their classes and batches, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.batches import Batches, Labels
from training.data.classes import Classes, find_classes
from training.data.shard_order import ShardOrder
from training.data.shard_stream import FETCHES, ShardStream
from training.data.sizes import Rule
from training.data.split import DataSplit, load_data_split
from training.data.streaming import load_streamed_split

if TYPE_CHECKING:
    from training.config import Config
    from training.run.runtime import Runtime


@dataclass(frozen=True)
class Inputs:
    """Images, classes and labels (None: not conditioned)."""

    split: DataSplit
    classes: Classes | None
    labels: Labels | None
    num_class_embeds: int | None  # of the network: one for each class and, if labels are dropped, the null class

    @property
    def num_images(self) -> int:
        """How many images are trained on."""
        return len(self.split.train_indices)


def load_inputs(config: Config, runtime: Runtime, size_rule: Rule) -> Inputs:
    """Load the data of a run on all ranks, and print what it is.

    Args:
        size_rule: of the network, see sizes.py.
    Raises:
        ValueError: as load_images, find_classes and Runtime.agree.
    """
    split = runtime.in_turn(lambda: load_split(config, size_rule, runtime.print))
    data = split.data
    classes, labels, num_class_embeds = None, None, None
    if config.class_conditional:
        classes = find_classes(split)
        labels = Labels(classes.data, len(classes.names), config.label_dropout, config.balance_classes)
        num_class_embeds = len(classes.names) + (config.label_dropout > 0)
    runtime.agree(
        number_of_images=len(split.train_indices),
        sha256_of_the_images=data.digest,
        number_of_held_out_images=len(split.held_out),
        sha256_of_the_labels=None if classes is None else classes.digest,
    )
    shape = f"{data.channels} x {data.height} x {data.width}"
    runtime.print(f"{len(split.train_indices)} images, {shape}, {data.images.dtype}, from {data.source}")
    if len(split.held_out):
        runtime.print(f"held out: {len(split.held_out)} images, {split.held_out_source}")
    if classes is not None:
        runtime.print(str(classes))
    return Inputs(split, classes, labels, num_class_embeds)


def make_batches(inputs: Inputs, config: Config, runtime: Runtime, global_batch: int) -> Batches:
    """The batches of all steps, of so many images; from shards, they begin to be read."""
    data, stream = inputs.split.data, None
    if config.streaming:
        images: Any = data.images
        order = ShardOrder(images.counts, inputs.split.train_indices, config.seed)
        turn = runtime.rank % runtime.processes_per_node, runtime.processes_per_node
        stream = ShardStream(images, order, global_batch, config.dataloader_num_workers or FETCHES, turn)
        runtime.print(
            f"streaming: {order.group_size} of {len(images.counts)} shards at a time, about "
            f"{order.group_size * len(images) / len(images.counts):,.0f} images are shuffled together"
        )
    return Batches(
        data.images,
        train_indices=inputs.split.train_indices,
        batch_size=global_batch,
        seed=config.seed,
        random_flip=config.random_flip,
        random_vertical_flip=config.random_vertical_flip,
        random_rotate90=config.random_rotate90,
        labels=inputs.labels,
        stream=stream,
        device=runtime.device,
    )


def load_split(config: Config, size_rule: Rule, log: Callable[[str], None]) -> DataSplit:
    """The images to train on and the held-out images."""
    return load_prepared_split(
        config.as_dict(),
        resolution=config.height_width,
        size_rule=size_rule,
        cache_dir=Path(config.cache_dir).expanduser(),
        num_workers=config.dataloader_num_workers,
        log=log,
    )


def load_prepared_split(
    settings: Mapping[str, Any], *, log: Callable[[str], None], num_workers: int = 0, **options: Any
) -> DataSplit:
    """The images of a run.

    Args:
        settings: the fields of its Config.
        options: resolution, size_rule and cache_dir, as of load_images.
    """
    names = "dataset_name dataset_config_name train_data_dir split image_column label_column center_crop background "
    options |= {name: settings[name] for name in (names + "min_side").split()}
    # A run without validation is trained on every image of the data.
    held_out = settings["validation_split"] if settings["validation_steps"] != 0 else "none"
    if settings["streaming"]:
        return load_streamed_split(held_out, cache_gb=settings["streaming_cache_gb"], log=log, **options)
    options |= {name: settings[name] for name in "include exclude follow_links split_folders on_bad_image".split()}
    return load_data_split(held_out, num_workers=num_workers, **options)
