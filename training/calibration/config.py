"""CALIBRATION CONFIG: every setting of a calibration, with default, unit and meaning, and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.command_line import parse_dataclass

MAX_IMAGES = 2**20
MAX_STEPS = 100  # with more, nothing is left to gain


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of a calibration.

    Args:
        model: folder of a finished run, folder of a saved pipeline, or a name on the Hub.
        output_dir: folder for the calibrated pipeline and the comparison; default: the folder of the model, whose
            scheduler gets the tables.
        num_inference_steps: numbers of sampling steps to calibrate, separated by commas.
        num_images: noises that samples are drawn from to compare them with the training images, at least 16.
        use_images: whether to fit to the training images, too; false: to the model's own samples of 100 steps only.
        guidance_scale: of classifier-free guidance that the tables are for; 1: no guidance.
        autoguidance_scale: of autoguidance that the tables are for; 1: no guidance.
        guidance_interval: LO,HI: guidance at the timesteps t with LO <= t < HI alone; default: at all timesteps.
        compare: whether to compare with every scheduler of diffusers in the end.
        num_samples: samples of each scheduler in the comparison, at least 64.
        fit_extractor: further features of the fit: a file or a model, as for extractor but another one, that knows such
            images, such as one that was trained on many photos; default: none.
        extractor: features of the comparison: pixels, classifier, a .th or .pt file or a model of transformers, as for
            evaluate.py. The fit uses others, and other images.
        seed: noise i has the seed `seed` + i.
        dataset_name: the training images, as for train.py; default: what the model was trained on.
        train_data_dir: folder of the training images, as for train.py; use it instead of dataset_name.
        revision: tag, branch or commit of a model on the Hub.
        batch_size: images per forward pass.
        cpu_threads: threads per process on a CPU; default: the processes of one machine share its cores.
        cache_dir: folder for decoded images, features and trained classifiers.
    """

    model: str
    output_dir: str | None = None
    num_inference_steps: tuple[int, ...] = (5, 10)
    num_images: int = 512
    use_images: bool = True
    guidance_scale: float = 1.0
    autoguidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    compare: bool = True
    num_samples: int = 512
    fit_extractor: str | None = None
    extractor: str = "classifier"
    seed: int = 0
    dataset_name: str | None = None
    train_data_dir: str | None = None
    revision: str | None = None
    batch_size: int = 64
    cpu_threads: int | None = None
    cache_dir: str = "~/.cache/ddpm_pipeline"

    def __post_init__(self) -> None:
        minimums = {"num_images": 16, "num_samples": 64, "seed": 0, "batch_size": 1, "cpu_threads": 1}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}: give at least {minimum}")
        for name in ("num_images", "num_samples"):
            if getattr(self, name) > MAX_IMAGES:
                raise ValueError(f"{name} is {getattr(self, name)}: give at most {MAX_IMAGES}")
        if self.seed > 2**31:
            raise ValueError(f"seed is {self.seed}: give at most 2^31, so that every noise has a seed below 2^32")
        steps = self.num_inference_steps
        if not steps or len(set(steps)) < len(steps) or not all(2 <= number <= MAX_STEPS for number in steps):
            given = ",".join(map(str, steps))
            raise ValueError(f"num_inference_steps is {given!r}: give different numbers from 2 to {MAX_STEPS}")
        if self.guidance_interval is not None and self.guidance_scale == self.autoguidance_scale == 1:
            given = ",".join(f"{end:g}" for end in self.guidance_interval)
            raise ValueError(f"guidance_interval is {given}, but there is no guidance: give a scale other than 1, too")
        if self.fit_extractor is not None:
            self._check_fit_extractor()
        if self.dataset_name and self.train_data_dir:
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and train_data_dir is {self.train_data_dir!r}: give one of them"
            )

    def _check_fit_extractor(self) -> None:
        from ddpm_pipeline.features import is_model  # imports torch: not before it is needed

        file = Path(self.fit_extractor or "").expanduser()
        if not is_model(str(file)) and (file.suffix not in (".th", ".pt") or not file.is_file()):
            raise ValueError(
                f"fit_extractor is {self.fit_extractor!r}: give a .th or .pt file, or a model of transformers, as a "
                "folder or as user/model on the Hub"
            )
        if not self.use_images:
            raise ValueError(f"fit_extractor is {str(file)!r}, but use_images is false: leave out one of them")
        if self.compare and Path(self.extractor).expanduser().resolve() == file.resolve():
            raise ValueError(
                f"extractor and fit_extractor are both {str(file)!r}: what tables are fitted to says little when it "
                "compares them; give another --extractor, or --compare false"
            )


def parse(arguments: Sequence[str] | None = None) -> CalibrationConfig:
    """The settings on the command line, the model first. A mistake prints one line and exits with code 2."""
    return parse_dataclass(CalibrationConfig, arguments, description="Calibrate a sampler.", positional=("model",))
