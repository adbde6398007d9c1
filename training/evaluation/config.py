"""EVALUATION CONFIG: every setting of an evaluation and of the choice of an average, and their command lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from training.command_line import parse_dataclass
from training.post_hoc_ema import check_length

FEATURE_METRICS = ("frechet", "kernel", "precision", "density", "memorisation")  # need samples and an extractor
SAMPLE_METRICS = (*FEATURE_METRICS, "shift", "accuracy")  # need samples; accuracy needs classes too
HELD_OUT_METRICS = ("bound", "flow")  # need held-out images, no samples
METRICS = (*SAMPLE_METRICS, *HELD_OUT_METRICS)
WEIGHTS = ("ema", "online")
# settings of a choice that mean what they mean in an evaluation
SHARED = ("num_samples", "seed", "num_reference", "dataset_name", "train_data_dir", "batch_size", "mixed_precision",
          "cpu_threads", "cache_dir")  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation.

    Args:
        model: folder of a finished run, folder of a saved pipeline, or a name on the Hub.
        output_dir: folder for report.json, report.md and the samples; default: the folder of the run.
        metrics: what to measure, separated by commas. Samples are compared with training images by frechet, kernel,
            precision (with recall), density (with coverage), memorisation, and shift (brightness and contrast).
            accuracy is for models with classes: whether a classifier recognises in a sample the class asked for. bound
            is the variational bound on the bits per dimension of held-out images, flow their likelihood by the
            probability-flow ODE, which needs the extra `ode`. Default: all but flow.
        num_samples: number of samples to draw with each sampler.
        num_inference_steps: numbers of sampling steps, separated by commas. The model card shows the first.
        eta: 1: ancestral sampling (DDPM), 0: deterministic sampling (DDIM); several are separated by commas. The model
            card shows the first. Default: calibrated steps, where the model has a table for this number of steps with
            each of the guidance scales, else 1.
        guidance_scales: scales of classifier-free guidance, separated by commas; samples are drawn with each. The model
            card shows the first, and which is best.
        autoguidance: guidance_scales are of autoguidance, by the guide of the model, instead.
        guidance_interval: LO,HI: guidance at the timesteps t with LO <= t < HI alone; default: at all timesteps.
        weights: ema (the published weights), online (without EMA; measured with the first sampler only), or both.
        extractor: features that samples are compared in: pixels, classifier (trained on the training images first), a
            .th or .pt file, or a model of transformers such as facebook/dinov2-small, a folder or a name on the Hub,
            see ddpm_pipeline/features.py; repeat the flag for several.
        seed: sample i has the seed `seed` + i; bound and flow draw their random numbers from it too.
        num_reference: number of training images to compare samples with; 0: all.
        num_bound_images: number of held-out images for bound.
        strata: number of timesteps per image for bound, at least 8; 0: all.
        num_flow_images: number of held-out images for flow.
        dataset_name: data to compare with, as for train.py; default: what the model was trained on.
        train_data_dir: folder of image files to compare with, as for train.py; use it instead of dataset_name.
        revision: tag, branch or commit of a model on the Hub.
        batch_size: images per forward pass.
        mixed_precision: what the network computes in: no (float32), fp16, bf16 or auto, as for train.py. flow is always
            in float32.
        cpu_threads: threads per process on a CPU; default: the processes of one machine share its cores.
        cache_dir: folder for decoded images, features and trained classifiers.
    """

    model: str
    output_dir: str | None = None
    metrics: tuple[str, ...] = METRICS[:-1]
    num_samples: int = 2048
    num_inference_steps: tuple[int, ...] = (50,)
    eta: tuple[float, ...] = ()
    guidance_scales: tuple[float, ...] = (1.0,)
    autoguidance: bool = False
    guidance_interval: tuple[float, float] | None = None
    weights: tuple[str, ...] = WEIGHTS
    extractor: tuple[str, ...] = ("classifier",)
    seed: int = 0
    num_reference: int = 10_000
    num_bound_images: int = 1000
    strata: int = 20
    num_flow_images: int = 64
    dataset_name: str | None = None
    train_data_dir: str | None = None
    revision: str | None = None
    batch_size: int = 64
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    cpu_threads: int | None = None
    cache_dir: str = "~/.cache/ddpm_pipeline"

    def __post_init__(self) -> None:
        minimums = {"num_samples": 16, "num_reference": 0, "num_bound_images": 2, "num_flow_images": 2, "strata": 0,
                    "batch_size": 1, "seed": 0, "cpu_threads": 1}  # fmt: skip
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}: give at least {minimum}")
        if 0 < self.strata < 8:
            raise ValueError(f"strata is {self.strata}: give at least 8 for a usable standard error, or 0 for all")
        if 0 < self.num_reference < 16:
            raise ValueError(f"num_reference is {self.num_reference}: give at least 16, or 0 for all")
        limit = 2**32 - 64 - self.num_samples  # 64, because samples are drawn in whole shards
        if self.seed > limit:
            raise ValueError(f"seed is {self.seed}: give at most {limit}, so that every sample has a seed below 2^32")
        self._check_lists()
        if self.guidance_interval is not None and set(self.guidance_scales) == {1}:
            raise ValueError(
                f"guidance_interval is {_join(self.guidance_interval)}, but guidance_scales is 1, no guidance: give "
                "other scales too"
            )
        if self.autoguidance and set(self.guidance_scales) == {1}:
            raise ValueError("autoguidance is true, but guidance_scales is 1, no guidance: give other scales too")
        if self.dataset_name and self.train_data_dir:
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and train_data_dir is {self.train_data_dir!r}: give one of them"
            )

    def _check_lists(self) -> None:
        for name in ("metrics", "weights", "num_inference_steps", "eta", "guidance_scales", "extractor"):
            values = getattr(self, name)
            if not values and name != "eta":
                raise ValueError(f"{name} is empty: give at least one value")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {_join(values)}: give each value once")
        for name, allowed in (("metrics", METRICS), ("weights", WEIGHTS)):
            if unknown := [value for value in getattr(self, name) if value not in allowed]:
                raise ValueError(f"{name} has {unknown[0]!r}: give some of {_join(allowed)}")
        if wrong := [steps for steps in self.num_inference_steps if steps < 1]:
            raise ValueError(f"num_inference_steps has {wrong[0]}: give at least 1")
        if wrong_scales := [scale for scale in self.guidance_scales if not math.isfinite(scale)]:
            raise ValueError(f"guidance_scales has {wrong_scales[0]}: give finite numbers")
        if wrong_eta := [eta for eta in self.eta if not 0 <= eta <= 1]:
            raise ValueError(f"eta has {wrong_eta[0]}: give numbers from 0 to 1")

    @property
    def sample_metrics(self) -> list[str]:
        return [metric for metric in self.metrics if metric in SAMPLE_METRICS]

    @property
    def feature_metrics(self) -> list[str]:
        return [metric for metric in self.metrics if metric in FEATURE_METRICS]

    @property
    def held_out_metrics(self) -> list[str]:
        return [metric for metric in self.metrics if metric in HELD_OUT_METRICS]


def parse(arguments: Sequence[str] | None = None) -> EvalConfig:
    """The settings on the command line, the model first. A mistake prints one line and exits with code 2."""
    return parse_dataclass(
        EvalConfig, arguments, description="Evaluate a model.", positional=("model",), repeatable=("extractor",)
    )


@dataclass(frozen=True)
class ChoiceConfig:
    """Settings of the choice of an average after training.

    Args:
        run: folder of a finished run of train.py --post_hoc_ema.
        ema: lengths to try, separated by commas, each a share of the run from 0.02 to 0.25.
        num_samples: number of samples to draw with each; all have the same seeds.
        num_inference_steps: number of sampling steps, with eta 1.
        extractor: features that samples are compared in, as for evaluate.py.
        seed: sample i has the seed `seed` + i.
        num_reference: number of training images to compare samples with; 0: all.
        dataset_name: data to compare with, as for train.py; default: what the model was trained on.
        train_data_dir: folder of image files to compare with, as for train.py; use it instead of dataset_name.
        batch_size: images per forward pass.
        mixed_precision: what the network computes in: no (float32), fp16, bf16 or auto, as for train.py.
        cpu_threads: threads per process on a CPU; default: the processes of one machine share its cores.
        cache_dir: folder for decoded images, features and trained classifiers.
    """

    run: str
    ema: tuple[float, ...] = (0.02, 0.05, 0.10, 0.20)
    num_samples: int = 2048
    num_inference_steps: int = 50
    extractor: str = "classifier"
    seed: int = 0
    num_reference: int = 10_000
    dataset_name: str | None = None
    train_data_dir: str | None = None
    batch_size: int = 64
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    cpu_threads: int | None = None
    cache_dir: str = "~/.cache/ddpm_pipeline"

    def __post_init__(self) -> None:
        if not self.ema or len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema is {_join(self.ema)!r}: give at least one length, and each once")
        for length in self.ema:
            check_length(length)
        self.evaluation()

    def evaluation(self) -> EvalConfig:
        """The evaluation that measures each length; ValueError: some setting is out of range."""
        return EvalConfig(
            model=self.run,
            metrics=("frechet",),
            num_inference_steps=(self.num_inference_steps,),
            eta=(1.0,),
            weights=("ema",),
            extractor=(self.extractor,),
            **{name: getattr(self, name) for name in SHARED},
        )


def parse_choice(arguments: Sequence[str] | None = None) -> ChoiceConfig:
    """The settings on the command line, the run first. A mistake prints one line and exits with code 2."""
    return parse_dataclass(ChoiceConfig, arguments, description="Choose the length of an average.", positional=("run",))


def check_installed(config: EvalConfig) -> None:
    """Raise ValueError if a library is missing: it is imported late, when the samples are already drawn."""
    extras = {"matplotlib": "eval"} | ({"torchdiffeq": "ode"} if "flow" in config.metrics else {})
    for module, extra in extras.items():
        if find_spec(module) is None:
            raise ValueError(f'{module} is not installed: pip install -c constraints.txt -e ".[train,{extra}]"')


def _join(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
