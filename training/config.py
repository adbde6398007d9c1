"""CONFIG: every setting of a training run, with default, unit and meaning, and how the command line sets it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm_pipeline.pixels import height_width
from training.command_line import parse_dataclass
from training.config_checks import check
from training.messages import some

CONFIGS = Path(__file__).parent / "configs"

GLOBAL_BATCH = 64  # images of a step, if no batch size is given; less in short runs
FIRST_OPTIMIZER, FIRST_TIMESTEP_SAMPLING = "adamw", "uniform"  # of runs that are older than the setting

# The trackers of accelerate, by name.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")

# Paths, and how a machine decodes the images; those that the images come from may differ if the images do not.
PER_MACHINE = ("output_dir", "cache_dir", "train_data_dir", "dataset_name", "init_from", "resume_from_checkpoint",
               "extractor", "cpu_threads", "tune", "dataloader_num_workers", "streaming_cache_gb")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings of a training run. A step is always an optimizer step.

    Args:
        output_dir: folder of the run; created if missing.
        dataset_name: "moons" (built in), a local folder of parquet files laid out as on the Hub, or a name on the Hub.
        dataset_config_name: configuration (subset) of the data set on the Hub.
        train_data_dir: folder of image files, searched recursively; use it instead of dataset_name.
        streaming: dataset_name or train_data_dir is shards: parquet files, tar files (WebDataset) or what
            `python -m training.data.pack` has written, in a folder, on the Hub, or at a URL such as s3://bucket/folder
            or https://host/shard-{000..999}.tar; a part of them at a time is on this machine's disk, see docs/data.md.
        streaming_cache_gb: disk for this part in cache_dir, in units of 10^9 bytes.
        split: split to train on, as in `datasets.load_dataset`; of a folder of images, its folder train, val or test.
        image_column: column of the images in a data set that has several; default: the only one. Of tar files that have
            several images of a sample: what follows its name, such as photo.png; default: the first.
        label_column: column of the labels, in a data set or in the metadata.csv of train_data_dir; default: the only
            one of class labels or called label; in a folder without it, the folders are the labels.
        include: patterns of the paths to use in train_data_dir, separated by commas, such as cats/* or *_photo.png;
            one without a slash is compared with each part of a path. Default: all images.
        exclude: patterns of the paths to leave out of train_data_dir; default: none.
        follow_links: follow symbolic links that lead out of train_data_dir.
        split_folders: folders train, val, valid, validation and test at the top of train_data_dir, below its only
            folder, or in each class are splits, and folders of masks beside images are left out; false: each of them is
            a class.
        resolution: size of the training images in pixels, one side or HEIGHTxWIDTH; default: the most common size in
            the data.
        center_crop: resize an image of another size until it covers the target, then crop its centre; false: stretch it
            to the target.
        random_flip: flip half of the training images horizontally; letters and digits are mirrored, too, so do not use
            it for images that have any.
        random_vertical_flip: flip half of the training images vertically, for images without an up and down, such as
            those of microscopes and satellites.
        random_rotate90: turn each training image by 0, 90, 180 or 270 degrees, for such images; they must be square.
        class_conditional: condition the network on the labels of the images, see docs/training.md.
        label_dropout: probability that an image has the label "no label" in a step, which classifier-free guidance
            needs; 0: the network has no such class, and no guidance.
        balance_classes: how often a class is drawn: none (as often as it is in the data), sqrt (by the square root of
            its number of images) or equal.
        background: colour behind transparent pixels, a name or #rrggbb.
        on_bad_image: unreadable images: "stop" names the first and exits, "skip" leaves them out. With streaming others
            of their shard take their place, whatever this is.
        min_side: shortest allowed side of an image in pixels; a smaller image counts as unreadable.
        cache_dir: folder for decoded images, extracted features, classifiers and what tuning found.
        dataloader_num_workers: processes that decode the images if they are not in cache_dir yet; 0: the main process
            decodes them. With streaming, shards that are fetched at once; 0: four.
        denoiser: network: tiny (2 M parameters), small (11 M), base (40 M) or large (119 M), each made for the size of
            the images; "auto", the largest of these that is fast enough here for the length of the run, or that of the
            model in init_from; ddpm-cifar10 (35.7 M); or that of another model: the folder of a pipeline, its name on
            the Hub, or config.json of a UNet2DModel.
        dropout: probability in the residual blocks of the network, against learning the images of a small set by heart;
            default: that of the denoiser, which is 0 for the four families.
        gradient_checkpointing: keep less for the backward pass and compute it again there: less memory, slower, the
            same result.
        ddpm_num_steps: T, number of diffusion timesteps.
        ddpm_beta_schedule: noise schedule: linear, scaled_linear, squaredcos_cap_v2 (cosine), sigmoid, laplace or su.
        prediction_type: what the network predicts: v_prediction, epsilon or sample (x_0).
        variance_type: variance of the reverse process: fixed_small (beta tilde), fixed_large (beta), or learned_range:
            the network predicts it, between the two, for better bits per dimension.
        loss_weighting: which timesteps count more: simple (each error of the prediction counts the same), or, whatever
            the network predicts, the L_simple of sample, epsilon or v_prediction, min_snr, soft_min_snr, edm, sigmoid
            or bound, see docs/training.md.
        timestep_sampling: timesteps of a batch: uniform (each on its own), stratified (spread evenly), logit_normal
            (more of those between noise and image, which then count more) or importance (more of those with large
            losses, which then count less, so that only the noise of the gradient changes), see docs/training.md;
            default: logit_normal with v_prediction, simple and a fixed variance, else uniform; a resumed run keeps its
            own.
        noise_candidates: number of noises that are drawn for an image, of which it gets the nearest (Immiscible
            Diffusion); 1: the image has no influence on its noise.
        input_perturbation: standard deviation of further noise in the input of the network, relative to the noise that
            is there and that the target knows, such as 0.1; 0: none.
        train_batch_size: images per forward pass and process. The global batch is this times the number of processes
            times gradient_accumulation_steps. "auto": a global batch of 64 times gradient_accumulation_steps, or of 16
            or 32 in a short run, in as few forward passes as memory allows.
        gradient_accumulation_steps: forward passes per step.
        global_batch_size: images of a step on all processes together, whatever their number, which has to divide it;
            gradient_accumulation_steps then follows, so a run can go on with more or fewer processes. Default: see
            train_batch_size.
        gradient_compression: what processes send of the gradients: none (float32, all of it), or bf16, which is half
            as many bytes for a slow network, and rounds them to 8 bits.
        max_train_minutes: minutes of training time, after which training ends. Sampling and validation do not count;
            what was trained before a run was resumed does. Default: no limit, or 60 if no other limit is given either.
        max_train_steps: number of steps after which training ends. Of several limits the first that is reached counts.
        max_train_images: number of images after which training ends, each counted as often as it is seen; rounded to
            whole steps.
        optimizer: adamw; or muon, which moves each weight matrix equally far in all directions, and everything else as
            AdamW does, see docs/training.md; default: muon, but adamw for networks of more than 20 million parameters
            and with init_from.
        learning_rate: learning rate of the optimizer at the end of its warm-up; default: 2e-3 with muon and 1e-3 with
            adamw, for networks of more than 20 million parameters 2e-4, and with init_from 1e-4; a resumed run keeps
            its own.
        lr_scheduler: learning rate after warm-up: cosine or linear decay to 0 at the end of the run; hold, which is
            constant until the last fifth of the run, then linear decay to 0; or constant.
        lr_warmup_steps: steps over which the learning rate rises linearly from 0; default: 500, but at most a
            twentieth of the run.
        adam_beta1: beta_1 of AdamW, decay of its running mean of the gradients.
        adam_beta2: beta_2 of AdamW, decay of its running mean of the squared gradients.
        adam_weight_decay: weight decay of AdamW and Muon: a step multiplies the weights by 1 - learning rate * weight
            decay.
        adam_epsilon: epsilon of AdamW, added to the root of the mean squared gradient.
        max_grad_norm: largest L2 norm of the gradient of all parameters together; a larger one is scaled down to it.
        ema_max_decay: decay of the EMA of the weights after its warm-up. Samples use the EMA weights.
        ema_inv_gamma: inverse gamma of the EMA warm-up, decay = 1 - (1 + (step - 1) / inv_gamma)^-power; the larger,
            the slower.
        ema_power: power of the EMA warm-up; the smaller, the slower.
        on_nonfinite: a step with a non-finite loss or gradient never updates the weights; "stop" then ends the run and
            names the images, "skip" continues with the next step.
        mixed_precision: what the network computes in: no (float32), fp16, bf16, or auto (what `accelerate launch` was
            configured with, else bf16 where the hardware supports it, else float32).
        cpu_threads: threads per process on a CPU; default: the processes of one machine share its cores, and a single
            one leaves other programs those that they keep busy, see docs/training.md. OMP_NUM_THREADS, which
            `accelerate launch` sets to 1, is ignored.
        tune: "auto" tries at the start of a run for a few seconds how the network computes fastest on this machine
            (memory format, attention, number of threads), and keeps what it finds in cache_dir; "off" takes what is
            usually fastest. Results differ by rounding.
        compile: compile the network with torch.compile.
        deterministic: use only operations that give the same bits each time. Slower on a GPU; no effect on a CPU.
        seed: seed of the initial weights and of every random number in training.
        logging_steps: steps between two entries of metrics.jsonl.
        report_to: where metrics go besides metrics.jsonl: tensorboard, wandb or another tracker of accelerate, several
            separated by commas; "none": nowhere else.
        validation_steps: steps between two validations on held-out images, by loss and bits per dimension; one also
            runs at the end. Default: after each tenth of the run, unless they and the samples have taken
            more than a fifth of its time (with keep_best always). 0: never.
        num_validation_images: number of held-out images to validate on.
        validation_split: split of the data set to hold out; default: its validation, valid, val or test split if it has
            one, else every 20th training image, at most 1000. "none": hold out nothing.
        validation_samples: number of images to sample at each validation, for their kernel distance to the held-out
            images; 0: none.
        extractor: features for that distance: pixels, classifier (trained on the training images first), a file, or a
            model of transformers such as facebook/dinov2-small, see ddpm_pipeline/features.py.
        save_images_steps: steps between two grids of samples; default: after each tenth of the run, as validation; 0:
            only at the end.
        num_sample_images: number of images in a grid of samples.
        ddpm_num_inference_steps: number of sampling steps, for all samples of the run.
        checkpointing_steps: steps between two checkpoints; one is also written at the end. Default: after each tenth of
            the run, and every 1000 steps.
        checkpoints_total_limit: number of checkpoints to keep, the newest ones.
        resume_from_checkpoint: "latest", "auto" (the latest if there is a valid one, else a new run), or a checkpoint
            folder of this run; default: a new run.
        init_from: model to initialise the weights from, a folder or a name on the Hub; nothing else is copied from it.
        keep_best: what pipeline/ has the EMA weights of: the validation with the lowest validation_loss or the lowest
            kernel_distance (which needs validation_samples), with those of the last step in pipeline-last/; default:
            the last step.
        guide_snapshot: share of the run, from 1/64 to 1/2, after which the EMA weights are kept as the guide of
            autoguidance, in pipeline/guide/, see docs/training.md; default: none.
        post_hoc_ema: keep two more averages of the weights and 64 snapshots of each in ema/, in 256 bytes of disk for
            each weight, so that training/choose_ema.py can choose the length of the average after training.
        push_to_hub: publish the model at the end, as training/publish.py does.
        push_to_hub_steps: steps between two publications during training; 0: only at the end.
        hub_model_id: repository on the Hub, "user/name"; created if missing.
        hub_private_repo: create the repository as private.
        license: license of the published weights, by its identifier on the Hub, such as mit or cc-by-4.0; default:
            apache-2.0 for the moons, otherwise unknown.
    """

    output_dir: str = "runs/model"
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    streaming: bool = False
    streaming_cache_gb: float = 50.0
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    include: str | None = None
    exclude: str | None = None
    follow_links: bool = False
    split_folders: bool = True
    resolution: str | int | None = None
    center_crop: bool = True
    random_flip: bool = False
    random_vertical_flip: bool = False
    random_rotate90: bool = False
    class_conditional: bool = False
    label_dropout: float = 0.1
    balance_classes: Literal["none", "sqrt", "equal"] = "none"
    background: str = "white"
    on_bad_image: Literal["stop", "skip"] = "stop"
    min_side: int = 8
    cache_dir: str = "~/.cache/ddpm_pipeline"
    dataloader_num_workers: int = 0
    denoiser: str = "auto"
    dropout: float | None = None
    gradient_checkpointing: bool = False
    ddpm_num_steps: int = 1000
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "su"] = "linear"
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    loss_weighting: Literal[
        "simple", "sample", "epsilon", "v_prediction", "min_snr", "soft_min_snr", "edm", "sigmoid", "bound"
    ] = "simple"
    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "importance"] | None = None
    noise_candidates: int = 1
    input_perturbation: float = 0.0
    train_batch_size: int | Literal["auto"] = "auto"
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    gradient_compression: Literal["none", "bf16"] = "none"
    max_train_minutes: float | None = None
    max_train_steps: int | None = None
    max_train_images: int | None = None
    optimizer: Literal["adamw", "muon"] | None = None
    learning_rate: float | None = None
    lr_scheduler: Literal["cosine", "linear", "hold", "constant"] = "cosine"
    lr_warmup_steps: int | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_max_decay: float = 0.9999
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    on_nonfinite: Literal["stop", "skip"] = "stop"
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    cpu_threads: int | None = None
    tune: Literal["auto", "off"] = "auto"
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    logging_steps: int = 50
    report_to: str = "tensorboard"
    validation_steps: int | None = None
    num_validation_images: int = 256
    validation_split: str | None = None
    validation_samples: int = 0
    extractor: str = "classifier"
    save_images_steps: int | None = None
    num_sample_images: int = 64
    ddpm_num_inference_steps: int = 50
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    init_from: str | None = None
    keep_best: Literal["validation_loss", "kernel_distance"] | None = None
    guide_snapshot: float | None = None
    post_hoc_ema: bool = False
    push_to_hub: bool = False
    push_to_hub_steps: int = 0
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def height_width(self) -> tuple[int, int] | None:
        """`resolution` as (H, W) in pixels."""
        if self.resolution is None:
            return None
        return height_width(self.resolution, "resolution")

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError if so many processes do not divide global_batch_size into passes of train_batch_size."""
        if self.global_batch_size is None:
            return
        size = 1 if self.train_batch_size == "auto" else self.train_batch_size
        passes = self.global_batch_size // size
        if passes % world_size:
            allowed = [str(n) for n in range(1, passes + 1) if passes % n == 0]
            raise ValueError(
                f"global_batch_size is {self.global_batch_size} and train_batch_size is {self.train_batch_size}: "
                f"{world_size} processes do not divide that; start {some(allowed)}, or give a multiple of "
                f"{world_size * size}"
            )

    def batch_of_rank(self, world_size: int, default: int = GLOBAL_BATCH) -> int:
        """Images of a step on each rank, see `check_world_size`."""
        if self.global_batch_size is not None:
            return self.global_batch_size // world_size
        size = -(-default // world_size) if self.train_batch_size == "auto" else self.train_batch_size
        return size * self.gradient_accumulation_steps

    def global_batch(self, world_size: int, default: int = GLOBAL_BATCH) -> int:
        """Images of a step on all ranks."""
        return self.batch_of_rank(world_size, default) * world_size

    @property
    def trackers(self) -> list[str]:
        """`report_to` as a list without repeats."""
        names = [name.strip() for name in self.report_to.split(",")]
        if names == ["none"]:
            return []
        for name in names:
            if name not in TRACKERS:
                raise ValueError(f"report_to is {self.report_to!r}: give some of {', '.join(TRACKERS)}, or none")
        return list(dict.fromkeys(names))

    def shared_by_all_processes(self) -> dict[str, Any]:
        """All settings but those that may differ between the machines of one run, see PER_MACHINE.

        Whether there is a model or a checkpoint to begin from is the same on all: they load it together.
        """
        shared = {name: value for name, value in self.as_dict().items() if name not in PER_MACHINE}
        which = self.resume_from_checkpoint
        shared["resume_from_checkpoint"] = which if which in (None, "latest", "auto") else "a folder"
        shared["init_from"] = None if self.init_from is None else "a model"
        return shared

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The settings on the command line: `--config FILE` and `--name value`, later ones win.

    Without a config or data set: those of the run that is resumed, else the moons. A mistake prints one line and exits
    with code 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    names_data = re.compile(r"--(config|dataset_name|train_data_dir|help|h)(=|$)|-h$")
    if not any(names_data.match(argument) for argument in arguments):
        arguments = [*(_settings_of_resumed_run(arguments) or ["--config", str(CONFIGS / "moons.yaml")]), *arguments]
    # The data of a preset is replaced by that of the command line, even if the two are in different options.
    opposite = {"--dataset_name": "--train_data_dir", "--train_data_dir": "--dataset_name"}
    named = {argument.split("=")[0] for argument in arguments} & opposite.keys()
    if len(named) == 1:
        arguments.append(f"{opposite[named.pop()]}=null")
    return parse_dataclass(
        Config,
        arguments,
        description="Train a DDPM.",
        config_help="YAML file of settings, such as training/configs/mnist.yaml",
    )


def _settings_of_resumed_run(arguments: list[str]) -> list[str]:
    """`--config runs/mine/config.yaml` if the run in this folder is to be resumed; else nothing.

    A folder without config.yaml prints one line and exits with code 2, except with "auto", which may begin a new run;
    and so does one that has a run on other data, if it is not to be resumed.
    """
    given: dict[str, str] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        given[name] = value if equals else following
    which, output_dir = given.get("--resume_from_checkpoint", "null"), given.get("--output_dir")
    if which not in ("null", "latest", "auto") and output_dir is None and Path(which).name != which:
        output_dir = str(Path(which).parent)
    file = Path(output_dir or "").expanduser() / "config.yaml"  # the run may have been moved since it was written
    if output_dir is None:
        return []
    if which == "null":
        if not _is_of_other_data(file):
            return []
        problem = "a run on other data than the moons: continue it with --resume_from_checkpoint latest, or name the "
        problem += "data of a new run"
    elif file.is_file():
        return ["--config", str(file), "--output_dir", output_dir]
    elif which == "auto":
        return []
    else:
        problem = "no config.yaml: give --config, or the data set of the run to resume"
    print(f"{Path(sys.argv[0]).name}: output_dir is {output_dir!r}, which has {problem}", file=sys.stderr)
    raise SystemExit(2)


def _is_of_other_data(file: Path) -> bool:
    """Whether a config.yaml is that of a run on other data than the moons, which are trained on if none is named."""
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or it is not of a run
        return False
    return isinstance(settings, dict) and settings.get("dataset_name") != "moons"
