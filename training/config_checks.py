"""CONFIG CHECKS: what of the settings of a training run is wrong, or does not go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from training.data.sizes import check_square

if TYPE_CHECKING:
    from training.config import Config

MAX_BATCH = 2**20  # images; far above any that is of use


def check(config: Config) -> None:
    """Raise ValueError if a setting is wrong, with its value and what is allowed."""
    _check_numbers(config)
    _check_combinations(config)
    _check_validation(config)
    _check_streaming(config)
    config.trackers  # noqa: B018  raises if report_to is wrong


def _check_numbers(config: Config) -> None:
    at_least_one = (
        "gradient_accumulation_steps global_batch_size max_train_steps max_train_images logging_steps min_side "
        "num_sample_images ddpm_num_steps ddpm_num_inference_steps checkpointing_steps checkpoints_total_limit "
        "cpu_threads noise_candidates"
    )
    at_least_zero = (
        "dataloader_num_workers lr_warmup_steps save_images_steps push_to_hub_steps validation_steps validation_samples"
    )
    for names, least in ((at_least_one, 1), ("num_validation_images", 2), (at_least_zero, 0)):
        for name in names.split():
            value = getattr(config, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: give an integer of at least {least}")
    if config.train_batch_size != "auto" and config.train_batch_size < 1:
        raise ValueError(f'train_batch_size is {config.train_batch_size}: give an integer of at least 1, or "auto"')
    for name in ("train_batch_size", "gradient_accumulation_steps", "global_batch_size"):
        if getattr(config, name) not in ("auto", None) and getattr(config, name) > MAX_BATCH:
            raise ValueError(f"{name} is {getattr(config, name)}: give at most {MAX_BATCH:,}")
    positive = "learning_rate adam_epsilon max_grad_norm ema_inv_gamma ema_power max_train_minutes streaming_cache_gb"
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: give a positive number")
    for name in ("adam_beta1", "adam_beta2", "ema_max_decay", "label_dropout", "dropout", "input_perturbation"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}: give a number in [0, 1)")
    if config.guide_snapshot is not None and not 1 / 64 <= config.guide_snapshot <= 1 / 2:
        raise ValueError(
            f"guide_snapshot is {config.guide_snapshot}: give a share of the run from 1/64 to 1/2, such as 0.125"
        )
    if not 0 <= config.adam_weight_decay < math.inf:
        raise ValueError(f"adam_weight_decay is {config.adam_weight_decay}: give a number of at least 0")


def _check_combinations(config: Config) -> None:
    if (config.dataset_name is None) == (config.train_data_dir is None):
        raise ValueError(
            f"dataset_name is {config.dataset_name!r} and train_data_dir is {config.train_data_dir!r}: give one of them"
        )
    if config.height_width is not None and config.random_rotate90:
        check_square(*config.height_width)
    if config.global_batch_size is not None:
        if config.gradient_accumulation_steps != 1:
            raise ValueError(
                f"global_batch_size is {config.global_batch_size} and gradient_accumulation_steps is "
                f"{config.gradient_accumulation_steps}: leave out one of them"
            )
        if config.train_batch_size != "auto" and config.global_batch_size % config.train_batch_size:
            raise ValueError(
                f"global_batch_size is {config.global_batch_size} and train_batch_size is {config.train_batch_size}: "
                "the second has to divide the first"
            )
    if config.input_perturbation and config.variance_type == "learned_range":
        raise ValueError(
            f"input_perturbation is {config.input_perturbation} and variance_type is 'learned_range', which would "
            "learn the variance of perturbed inputs: leave out one of them"
        )
    if config.resume_from_checkpoint == "":  # an unset variable of a shell script must not start a new run
        raise ValueError('resume_from_checkpoint is "": give "latest", "auto" or a checkpoint folder')
    for name in ("output_dir", "cache_dir", "train_data_dir", "dataset_name", "denoiser", "init_from"):
        if getattr(config, name) == "":
            raise ValueError(f'{name} is "": give a name')
    if config.balance_classes != "none" and not config.class_conditional:
        raise ValueError(
            f"balance_classes is {config.balance_classes!r}, but class_conditional is false: add --class_conditional"
        )
    if config.push_to_hub and not config.hub_model_id:
        raise ValueError(f"push_to_hub is true and hub_model_id is {config.hub_model_id!r}: give user/name")
    if not config.push_to_hub and (config.hub_model_id or config.push_to_hub_steps):
        raise ValueError(
            f"hub_model_id is {config.hub_model_id!r} and push_to_hub_steps is {config.push_to_hub_steps}, but "
            "push_to_hub is false: add --push_to_hub"
        )
    if config.ddpm_num_inference_steps > config.ddpm_num_steps:
        raise ValueError(
            f"ddpm_num_inference_steps is {config.ddpm_num_inference_steps}: give at most ddpm_num_steps, "
            f"{config.ddpm_num_steps}"
        )


def _check_validation(config: Config) -> None:
    if config.validation_samples == 1:
        raise ValueError("validation_samples is 1: give at least 2, or 0 for none")
    if config.validation_samples and (config.validation_steps == 0 or config.validation_split == "none"):
        raise ValueError(
            f"validation_samples is {config.validation_samples}, but validation_steps is {config.validation_steps} and "
            f"validation_split is {config.validation_split!r}, so there is no validation: set validation_samples to 0"
        )
    if config.keep_best and (config.validation_steps == 0 or config.validation_split == "none"):
        cause = "validation_steps is 0" if config.validation_steps == 0 else 'validation_split is "none"'
        raise ValueError(
            f"keep_best is {config.keep_best!r}, but {cause}, so there is no validation: leave out one of them"
        )
    if config.keep_best == "kernel_distance" and not config.validation_samples:
        raise ValueError(
            "keep_best is 'kernel_distance', but validation_samples is 0: give how many images to sample at each "
            "validation, such as 256"
        )


def _check_streaming(config: Config) -> None:
    place = config.dataset_name or config.train_data_dir or ""
    if not config.streaming:
        if "://" in place:
            raise ValueError(f"the data is {place!r}: a URL needs --streaming")
        return
    if place == "moons":
        raise ValueError("streaming is true, but the moons are drawn and have no shards: leave it out")
    for name in ("include", "exclude"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is {getattr(config, name)!r}: it is for folders of images, and streaming is true")
    if config.balance_classes != "none":
        raise ValueError(
            f"balance_classes is {config.balance_classes!r}, but streaming is true, which has a part of the images "
            "at hand: give none"
        )
