"""Every setting of a training run with its default, unit and meaning, and how the command line fills them in."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

CONFIGS = Path(__file__).parent / "configs"

# What training/evaluate.py measures: of the features of samples, of samples, of held-out pictures.
OF_FEATURES = ("frechet", "kernel", "precision", "density", "memorisation")
OF_SAMPLES = (*OF_FEATURES, "shift")
OF_HELD_OUT = ("bound", "flow")
METRICS = (*OF_SAMPLES, *OF_HELD_OUT)


@dataclass(frozen=True)
class Config:
    """Settings of a training run. A step is an optimizer step, everywhere.

    Args:
        output_dir: folder of the run; made if missing.
        dataset_name: "moons", a local folder of parquet files in the Hub's layout, or a name on the Hub.
        dataset_config_name: the Hub's name for a part of a data set.
        train_data_dir: folder of image files, at any depth, instead of dataset_name.
        resolution: side of the pictures, or HEIGHTxWIDTH, in pixels; by default the commonest size in the data.
        center_crop: pictures of another size are resized to cover the target and cropped; false: squeezed to it.
        random_flip: mirror half of the pictures, left to right.
        background: colour behind transparent pixels, a name or #rrggbb.
        on_bad_image: "stop" lists the unreadable pictures and ends, "skip" leaves them out.
        min_side: pixels; pictures with a shorter side count as unreadable.
        cache_dir: where decoded pictures are kept.
        dataloader_num_workers: processes that decode pictures the first time; 0: this one.
        denoiser: the network: tiny, small or ddpm-cifar10.
        ddpm_num_steps: T, the length of the walk.
        ddpm_beta_schedule: linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace or su.
        prediction_type: what the network says: epsilon, sample (x_0) or v_prediction.
        variance_type: of the walk home: fixed_small or fixed_large.
        train_batch_size: pictures in one forward pass of one process. The global batch is this times processes times
            gradient_accumulation_steps.
        gradient_accumulation_steps: forward passes for one step.
        max_train_steps: the run ends after so many steps.
        max_train_minutes: or after so many minutes of training, whichever comes first; a resumed run has them anew.
        learning_rate: of AdamW, after warm-up.
        lr_scheduler: constant, linear or cosine (to 0 at max_train_steps).
        lr_warmup_steps: steps in which the learning rate rises from 0.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_weight_decay: of AdamW.
        adam_epsilon: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        ema_max_decay: of the moving average of the weights, after its warm-up; samples use the average.
        ema_inv_gamma: of the average's warm-up.
        ema_power: of the average's warm-up.
        on_nonfinite: a step with a loss or gradient that is not a finite number is never done; "stop" then ends the run
            with the images named, "skip" goes on with the next step.
        mixed_precision: what the network computes in: no (float32), fp16, bf16, or auto: bf16 where the machine has it.
        cpu_threads: threads of one process on a CPU; by default the processes share out all cores. (`accelerate launch`
            asks for one thread, which is not obeyed, and neither is OMP_NUM_THREADS, by which it asks.)
        compile: compile the network with torch.compile.
        deterministic: only operations that give the same bits each time, as on a CPU they do anyway; slower on a GPU.
        seed: of the first weights and of every random number.
        logging_steps: steps between two lines of metrics.
        validation_steps: steps between two validation losses, of pictures that are held out (training/validation.py);
            one is also measured at the end. 0: never.
        num_validation_images: held-out pictures that are used for it.
        validation_split: split of the data set that is held out; by default validation, valid, val or test if it has
            one, else every 20th picture of what is learned from, at most 1000. "none": nothing is held out.
        validation_samples: so many pictures are drawn each time, for their kernel distance to the held-out ones;
            0: none.
        extractor: of the features that this distance is taken between: pixels, classifier (trained on these pictures
            first), or a file, see ddpm_pipeline/fidelity.py.
        save_images_steps: steps between two sample pictures; 0: only at the end.
        num_sample_images: pictures in a sample picture.
        ddpm_num_inference_steps: steps of the walk home for sample pictures.
        checkpointing_steps: steps between two checkpoints; one is also written at the end.
        checkpoints_total_limit: so many of the newest checkpoints are kept.
        resume_from_checkpoint: "latest", or a checkpoint folder of this run.
        init_from: a model to begin from, a folder or a name on the Hub: its weights, and nothing else of it.
        push_to_hub: publish the model at the end, as training/publish.py does.
        push_to_hub_steps: publish it every so many steps as well; 0: only at the end.
        hub_model_id: "user/name" on the Hub; made if it is missing.
        hub_private_repo: make it private.
        license: of the published weights, by the Hub's name for it, such as mit or cc-by-4.0.
    """

    output_dir: str = "runs/model"
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    resolution: str | int | None = None
    center_crop: bool = True
    random_flip: bool = False
    background: str = "white"
    on_bad_image: Literal["stop", "skip"] = "stop"
    min_side: int = 8
    cache_dir: str = "~/.cache/ddpm_pipeline"
    dataloader_num_workers: int = 0
    denoiser: Literal["tiny", "small", "ddpm-cifar10"] = "small"
    ddpm_num_steps: int = 1000
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "su"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"
    train_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 100_000
    max_train_minutes: float | None = None
    learning_rate: float = 2e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 500
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_max_decay: float = 0.9999
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    on_nonfinite: Literal["stop", "skip"] = "stop"
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    cpu_threads: int | None = None
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    logging_steps: int = 50
    validation_steps: int = 1000
    num_validation_images: int = 256
    validation_split: str | None = None
    validation_samples: int = 0
    extractor: str = "classifier"
    save_images_steps: int = 1000
    num_sample_images: int = 64
    ddpm_num_inference_steps: int = 50
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    init_from: str | None = None
    push_to_hub: bool = False
    push_to_hub_steps: int = 0
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and train_data_dir is {self.train_data_dir!r}: give one of them"
            )
        self.height_width  # noqa: B018  says what is wrong with resolution
        for names, least in (
            (
                "train_batch_size gradient_accumulation_steps max_train_steps logging_steps num_sample_images min_side",
                1,
            ),
            ("ddpm_num_steps ddpm_num_inference_steps checkpointing_steps checkpoints_total_limit", 1),
            ("num_validation_images", 2),
            ("dataloader_num_workers lr_warmup_steps save_images_steps push_to_hub_steps validation_steps", 0),
        ):
            for name in names.split():
                if getattr(self, name) < least:
                    raise ValueError(f"{name} is {getattr(self, name)}: give an integer of at least {least}")
        positive = "learning_rate adam_epsilon max_grad_norm ema_inv_gamma ema_power max_train_minutes"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: give a positive number")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number in [0, 1)")
        if not 0 <= self.adam_weight_decay < math.inf:
            raise ValueError(f"adam_weight_decay is {self.adam_weight_decay}: give 0 or more")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads is {self.cpu_threads}: give an integer of at least 1")
        if self.resume_from_checkpoint == "":  # an unset variable of a shell script: no new run for that
            raise ValueError('resume_from_checkpoint is "": give "latest" or a checkpoint folder')
        if self.validation_samples and not self.validation_samples >= 2:
            raise ValueError(f"validation_samples is {self.validation_samples}: give at least 2, or 0 for none")
        if self.validation_samples and (not self.validation_steps or self.validation_split == "none"):
            raise ValueError(
                f"validation_samples is {self.validation_samples}, but validation_steps is {self.validation_steps} and "
                f"validation_split {self.validation_split!r}: leave it out, or give these"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError(
                f"push_to_hub is true, and hub_model_id is {self.hub_model_id!r}: give it a name, user/name"
            )
        if not self.push_to_hub and (self.hub_model_id or self.push_to_hub_steps):
            raise ValueError(
                f"hub_model_id is {self.hub_model_id!r} and push_to_hub_steps is {self.push_to_hub_steps}, but "
                "push_to_hub is false: give --push_to_hub too"
            )
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                f"ddpm_num_inference_steps is {self.ddpm_num_inference_steps}: give at most ddpm_num_steps, "
                f"{self.ddpm_num_steps}"
            )

    @property
    def height_width(self) -> int | tuple[int, int] | None:
        """`resolution` as numbers."""
        if self.resolution is None:
            return None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(self.resolution))
        sides = [int(side) for side in match.groups() if side] if match else [0]
        if min(sides) < 1:
            raise ValueError(f"resolution is {self.resolution!r}: give a side in pixels, or HEIGHTxWIDTH")
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step 1, 2, ...: rising over the warm-up, then as `lr_scheduler` says."""
        factor = min(1.0, step / self.lr_warmup_steps) if self.lr_warmup_steps else 1.0
        rest = max(1, self.max_train_steps - self.lr_warmup_steps)
        progress = min(1.0, max(0, step - 1 - self.lr_warmup_steps) / rest)
        if self.lr_scheduler == "linear":
            factor *= 1 - progress
        elif self.lr_scheduler == "cosine":
            factor *= (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * factor

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line: `--config FILE` and `--name value`, later ones win; without a data set it is the moons.

    `--random_flip` alone means `--random_flip true`.

    A mistake is printed, and the process ends with exit code 2.
    """
    from jsonargparse import ArgumentParser

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    switches = {f"--{field.name}" for field in fields(Config) if field.type == "bool"}
    arguments = [
        f"{argument}=true" if argument in switches and (not following or following.startswith("-")) else argument
        for argument, following in zip(arguments, [*arguments[1:], ""])
    ]
    chooses = re.compile(r"--(config|dataset_name|train_data_dir|help|h)(=|$)|-h$")
    if not any(chooses.match(argument) for argument in arguments):
        arguments = ["--config", str(CONFIGS / "moons.yaml"), *arguments]
    # A preset names its data; who names other data on the command line means these instead.
    sources = {"--dataset_name": "--train_data_dir", "--train_data_dir": "--dataset_name"}
    named = {argument.split("=")[0] for argument in arguments} & sources.keys()
    if len(named) == 1:
        arguments.append(f"{sources[named.pop()]}=null")
    parser = ArgumentParser(description="Train a DDPM.", allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="a YAML file of settings, such as training/configs/mnist.yaml"
    )
    parser.add_class_arguments(Config)
    given = parser.parse_args(arguments)
    try:
        return Config(**{field.name: given[field.name] for field in fields(Config)})
    except ValueError as error:
        parser.error(str(error))
        raise AssertionError("error() does not return") from error
