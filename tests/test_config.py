"""Config and the command line: a mistake exits with code 2 and names the value, before anything is built."""

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from ddpm_pipeline.loss_weights import WEIGHTINGS
from ddpm_pipeline.scheduling_ddpm import BETA_SCHEDULES
from ddpm_pipeline.timesteps import TimestepSampling
from training.command_line import parse_dataclass
from training.config import CONFIGS, Config, parse
from training.denoiser import PRESETS

ROOT = Path(__file__).parents[1]
MOONS = ("--dataset_name", "moons")
NEEDS_DATA = {name: ["--train_data_dir", "my/images"] for name in ("tiles.yaml", "emoji-64.yaml")}


def make_config(**options):
    return Config(**{"dataset_name": "moons", **options})


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("--learning_rat 1e-3", "learning_rat"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--max_train_steps ten", "ten"),
        ("--max_train_steps 1.5", "1.5"),
        ("--max_train_steps 0", "0"),
        ("--train_batch_size -4", "-4"),
        ("--train_batch_size 100000000000000000000", "at most 1,048,576"),
        ("--gradient_accumulation_steps 1048577", "1048577"),
        ("--gradient_accumulation_steps 0", "0"),
        ("--global_batch_size 0", "0"),
        ("--global_batch_size 1048577", "at most 1,048,576"),
        ("--global_batch_size 64 --gradient_accumulation_steps 2", "leave out one"),
        ("--global_batch_size 64 --train_batch_size 24", "has to divide"),
        ("--gradient_compression fp16", "fp16"),
        ("--loss_weighting min_snr_5", "min_snr_5"),
        ("--timestep_sampling random", "random"),
        ("--noise_candidates 0", "0"),
        ("--input_perturbation -0.1", "-0.1"),
        ("--input_perturbation 1", "1"),
        ("--input_perturbation 0.1 --variance_type learned_range", "variance_type is 'learned_range'"),
        ("--optimizer sgd", "sgd"),
        ("--learning_rate fast", "fast"),
        ("--learning_rate 0", "0"),
        ("--learning_rate .nan", "nan"),
        ("--learning_rate .inf", "inf"),
        ("--lr_scheduler step", "step"),
        ("--lr_warmup_steps -1", "-1"),
        ("--adam_beta1 1", "1"),
        ("--adam_beta2 -0.1", "-0.1"),
        ("--adam_weight_decay -0.5", "-0.5"),
        ("--adam_weight_decay .nan", "nan"),
        ("--adam_epsilon 0", "0"),
        ("--max_grad_norm -1", "-1"),
        ("--ema_max_decay 1", "1"),
        ("--ema_inv_gamma 0", "0"),
        ("--ema_power -0.75", "-0.75"),
        ("--max_train_minutes 0", "0"),
        ("--resolution 0", "0"),
        ("--resolution 32x", "32x"),
        ("--resolution 32x0", "32x0"),
        ("--resolution big", "big"),
        ("--random_flip maybe", "maybe"),
        ("--prediction_type noise", "noise"),
        ("--variance_type learned", "learned"),
        ("--ddpm_beta_schedule exponential", "exponential"),
        ("--ddpm_num_steps 20 --ddpm_num_inference_steps 21", "21"),
        ("--mixed_precision fp8", "fp8"),
        ("--on_bad_image ignore", "ignore"),
        ("--checkpointing_steps 0", "0"),
        ("--checkpoints_total_limit 0", "0"),
        ("--logging_steps 0", "0"),
        ("--num_sample_images 0", "0"),
        ("--save_images_steps -1", "-1"),
        ("--dataloader_num_workers -1", "-1"),
        ("--train_data_dir images", "images"),  # beside --dataset_name
    ],
)
def test_a_mistake_exits_with_2_and_one_line_that_names_the_value(arguments, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse([*MOONS, *arguments.split()])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert value in message
    assert arguments.replace("=", " ").split(" ")[-2].lstrip("-") in message
    assert message.count("\n") == 1


def test_a_mistake_in_a_file_exits_with_2(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for content, value in (
        ("batch: 3", f"{file}: Option 'batch'"),
        ("seed: x", "seed is 'x'"),
        ("seed: [1", f"{file}: Problems parsing config"),
    ):
        file.write_text(f"dataset_name: moons\n{content}\n")
        with pytest.raises(SystemExit) as exit_:
            parse(["--config", str(file)])
        assert exit_.value.code == 2
        assert value in capsys.readouterr().err


def test_a_data_set_is_required(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as exit_:
        parse(["--config", str(tmp_path / "empty.yaml")])
    assert exit_.value.code == 2
    assert "give one of them" in capsys.readouterr().err


def test_accelerate_launch_reports_the_mistake(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "training/train.py", "--learning_rat", "1"]
    command += ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "learning_rat" in child.stderr
    assert child.returncode != 0
    assert "exit status 2" in child.stderr  # that of train.py; accelerate itself ends with 1
    assert not (tmp_path / "run").exists()


# ---- Where the values come from --------------------------------------------------------------------------------------


def test_the_default_is_the_moons_preset():
    assert parse([]) == parse(["--config", str(CONFIGS / "moons.yaml")])
    assert parse([]).dataset_name == "moons"
    assert parse(["--seed", "3"]) == parse(["--config", str(CONFIGS / "moons.yaml"), "--seed=3"])
    assert parse(["--resolution", "16"]).height_width == (16, 16)  # the preset has 32
    # Naming a data set leaves the preset out.
    assert parse([*MOONS]) == make_config()
    assert parse(["--dataset_name=moons"]) == make_config()
    assert parse(["--train_data_dir=images"]) == Config(train_data_dir="images")


def test_later_arguments_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: moons\nseed: 5\nlearning_rate: 1.0e-3\nresolution: 16\nmax_train_minutes: 2\n")
    from_file = {"seed": 5, "learning_rate": 1e-3, "resolution": 16, "max_train_minutes": 2.0}
    assert parse(["--config", str(file)]) == make_config(**from_file)
    changed = parse(["--config", str(file), "--seed", "7", "--resolution", "8x16", "--max_train_minutes", "null"])
    assert changed == make_config(**from_file | {"seed": 7, "resolution": "8x16", "max_train_minutes": None})
    assert parse(["--seed", "7", "--config", str(file)]).seed == 5
    folder = parse(["--config", str(file), "--dataset_name", "null", "--train_data_dir", "images"])
    assert (folder.dataset_name, folder.train_data_dir) == (None, "images")


def test_a_boolean_flag_without_a_value_is_true():
    assert parse([*MOONS, "--random_flip"]).random_flip
    assert parse(["--random_flip", *MOONS]).random_flip
    assert parse([*MOONS, "--random_flip", "true"]).random_flip
    assert not parse([*MOONS, "--center_crop", "false"]).center_crop
    assert not parse(MOONS).random_flip


def test_numbers_may_have_an_exponent():
    parsed = parse([*MOONS, "--learning_rate", "1e-3", "--adam_epsilon", "1e-9"])
    assert (parsed.learning_rate, parsed.adam_epsilon) == (1e-3, 1e-9)


def test_resolution_is_a_side_or_height_and_width():
    for resolution, expected in ((None, None), (16, (16, 16)), ("16", (16, 16)), ("16x24", (16, 24))):
        assert make_config(resolution=resolution).height_width == expected


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_parses_and_survives_a_round_trip(file, tmp_path):
    more = NEEDS_DATA.get(file.name, [])
    preset = parse(["--config", str(file), *more])
    for name, value in yaml.safe_load(file.read_text()).items():
        assert getattr(preset, name) == value
    copy = tmp_path / "config.yaml"
    copy.write_text(yaml.safe_dump(preset.as_dict(), sort_keys=False))
    assert parse(["--config", str(copy)]) == preset


def test_choices_match_the_loss_weightings_and_the_sampling_of_timesteps():
    types = get_type_hints(Config)
    assert get_args(types["loss_weighting"]) == WEIGHTINGS
    assert types["timestep_sampling"] == TimestepSampling | None


def test_choices_match_the_schedules(capsys):
    for choice in BETA_SCHEDULES:
        assert parse([*MOONS, "--ddpm_beta_schedule", choice]).ddpm_beta_schedule == choice
    with pytest.raises(SystemExit):
        parse([*MOONS, "--ddpm_beta_schedule", "none of them"])
    message = capsys.readouterr().err
    assert all(choice in message for choice in BETA_SCHEDULES)


def test_every_field_is_documented():
    documented = [line.split(":")[0].strip() for line in Config.__doc__.splitlines() if line.startswith("        ")]
    assert [name for name in documented if name in {field.name for field in fields(Config)}] == [
        field.name for field in fields(Config)
    ]


@pytest.mark.parametrize("train_batch_size", ["auto", 4])
def test_a_global_batch_is_the_same_on_all_numbers_of_processes_that_divide_it(train_batch_size):
    config = make_config(global_batch_size=48, train_batch_size=train_batch_size)
    allowed = []
    for world_size in range(1, 60):
        if 48 % (world_size * (1 if train_batch_size == "auto" else 4)):
            with pytest.raises(ValueError, match=rf"is 48 and .* is {train_batch_size}: {world_size} .* 1, 2, 3, 4, 6"):
                config.check_world_size(world_size)
            continue
        config.check_world_size(world_size)
        allowed.append(world_size)
        assert config.global_batch(world_size) == 48
        assert train_batch_size == "auto" or config.batch_of_rank(world_size) % 4 == 0
    expected = [1, 2, 3, 4, 6, 12] if train_batch_size == 4 else [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert allowed == expected


def test_the_cifar10_preset_has_the_numbers_of_ho_et_al_2020():
    """Section 4 and appendix B: what the paper states for CIFAR-10."""
    cifar10 = parse(["--config", str(CONFIGS / "cifar10.yaml")])
    paper = {
        "resolution": 32,
        "ddpm_num_steps": 1000,
        "ddpm_beta_schedule": "linear",  # from 1e-4 to 0.02, which are the scheduler's defaults
        "prediction_type": "epsilon",
        "variance_type": "fixed_large",  # their choice for sampling CIFAR-10
        "train_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 800_000,
        "max_train_minutes": None,
        "learning_rate": 2e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 5000,  # from their code
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 0.0,  # so AdamW is their Adam
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,  # from their code
        "ema_max_decay": 0.9999,
        "random_flip": True,
    }
    assert {name: getattr(cifar10, name) for name in paper} == paper
    network = PRESETS[cifar10.denoiser]
    assert network["block_out_channels"] == (128, 256, 256, 256)
    assert network["dropout"] == 0.1
    assert [i for i, kind in enumerate(network["down_block_types"]) if "Attn" in kind] == [1]  # at 16 x 16


def test_data_on_the_command_line_replaces_the_data_of_a_preset():
    preset = f"--config={CONFIGS / 'mnist.yaml'}"
    config = parse([preset, "--train_data_dir", "images"])
    assert (config.train_data_dir, config.dataset_name) == ("images", None)
    assert parse(["--train_data_dir=images", preset]).dataset_name is None
    tiles = parse([f"--config={CONFIGS / 'tiles.yaml'}", "--dataset_name=moons"])
    assert (tiles.train_data_dir, tiles.dataset_name) == (None, "moons")
    with pytest.raises(SystemExit):
        parse([preset, "--train_data_dir=images", "--dataset_name=moons"])


def test_help_explains_each_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "folder of image files, searched recursively" in text
    assert "every random number" in text


# ---- parse_dataclass: what training/evaluate.py needs beside this ----------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Options of a test.

    Args:
        model: a folder.
        steps: numbers of steps.
        names: some names.
        paths: some files.
        fast: skip something.
    """

    model: str
    steps: tuple[int, ...] = (50,)
    names: list[str] | None = None
    paths: tuple[str, ...] = ()
    fast: bool = False


def parse_options(*arguments):
    return parse_dataclass(Options, arguments, description="A test.", positional=["model"], repeatable=["paths"])


def test_a_list_takes_commas_and_the_last_flag_wins():
    assert parse_options("runs/a") == Options("runs/a")
    assert parse_options("runs/a", "--steps", "50, 100").steps == (50, 100)
    assert parse_options("--steps=50,100", "runs/a") == Options("runs/a", (50, 100))
    assert parse_options("runs/a", "--steps", "5,6", "--steps", "7").steps == (7,)
    assert parse_options("runs/a", "--steps", "5", "--steps", "[7]").steps == (7,)
    assert parse_options("--steps", "5", "--", "runs/a") == Options("runs/a", (5,))
    assert parse_options("runs/a", "--steps=[5, 7]").steps == (5, 7)
    assert parse_options("runs/a", "--names", "1,b: c.th,yes").names == ["1", "b: c.th", "yes"]
    assert parse_options("runs/a", "--names", "null").names is None


def test_a_repeatable_flag_takes_one_item_with_its_commas():
    assert parse_options("runs/a", "--paths", "a, b.pt", "--steps", "5", "--paths=c").paths == ("a, b.pt", "c")


def test_an_empty_field_of_a_yaml_file_is_named(tmp_path, capsys):
    """Null is a value of optional fields only: seed, a number, and lists, strings and choices alike need one."""
    file = tmp_path / "a config.yaml"
    for field in ("seed", "logging_steps", "background", "on_bad_image", "report_to", "adam_beta1"):
        file.write_text(f"dataset_name: moons\n{field}:\n")
        with pytest.raises(SystemExit) as exit_:
            parse(["--config", str(file)])
        assert exit_.value.code == 2
        printed = capsys.readouterr().err
        assert f"{field} is null: give " in printed and printed.count("\n") == 1
    file.write_text("dataset_name: moons\nmax_train_minutes:\n")
    assert parse(["--config", str(file)]).max_train_minutes is None


def test_a_mistake_in_a_yaml_file_names_the_file(tmp_path, capsys):
    file = tmp_path / "a config.yaml"
    file.write_text("foo: 1\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    assert f"{file}: " in capsys.readouterr().err


def test_a_boolean_flag_before_a_positional_argument():
    assert parse_options("--fast", "runs/a") == Options("runs/a", fast=True)
    assert parse_options("--fast", "false", "runs/a") == Options("runs/a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "required: model"),
        (["runs/a", "runs/b"], "runs/b"),
        (["runs/a", "--steps", "5,x"], "steps is 'x': give an integer, or several"),
        (["runs/a", "--steps"], "--steps: expected one argument"),
        (["runs/a", "--stesp", "5"], "--stesp"),
    ],
)
def test_a_mistake_in_options_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_options(*arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


# ---- Files of settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("mixed_precision: NO", "mixed_precision", "no"),
        ("mixed_precision: false", "mixed_precision", "no"),
        ("output_dir: 2024", "output_dir", "2024"),
        ("output_dir: 007", "output_dir", "007"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("output_dir: on", "output_dir", "on"),
        ("license: no", "license", "no"),
        ("hub_model_id: null", "hub_model_id", None),
        ("resolution: 32", "resolution", 32),
        ("seed: '3'", "seed", 3),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("random_flip: yes", "random_flip", True),
    ],
)
def test_a_value_in_a_file_has_the_type_of_its_setting(tmp_path, line, field, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name: moons\n{line}\n", encoding="utf-8-sig")
    parsed = getattr(parse(["--config", str(file)]), field)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output_dir: caf\xe9\n", "not UTF-8"),
        ("seed: 1\n".encode("utf-16"), "not UTF-8"),
        (b"", "is empty"),
        (b"# seed: 1\n", "is empty"),
        (b"- seed\n", "does not hold settings"),
        (b"text", "does not hold settings"),
        (b"? [seed]\n: 1\n", "does not hold settings"),
        (b"seed: 1\nseed: 2\n", "seed is given twice"),
        (b"seeds: 1\n", "Option 'seeds'"),
        (b"mixed_precision: true\n", "mixed_precision is 'true': give one of auto, no, fp16, bf16"),
        (b'output_dir: ""\n', 'output_dir is ""'),
        (b'denoiser: ""\n', 'denoiser is ""'),
        (None, "No such file"),
    ],
)
def test_a_file_that_holds_no_settings_exits_with_2_and_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        parse([*MOONS, f"--config={file}"])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and message in printed and printed.count("\n") == 1
    assert str(file) in printed or " is " in message  # a wrong value is named without its file


# ---- The settings of a run that is resumed ---------------------------------------------------------------------------


def test_resuming_with_the_folder_alone_takes_the_settings_of_its_run(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "checkpoint-000003").mkdir(parents=True)
    settings = make_config(output_dir="elsewhere", prediction_type="sample", seed=5, max_train_steps=7)
    (run / "config.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    checkpoint = str(run / "checkpoint-000003")
    for arguments in (["--output_dir", str(run), "--resume_from_checkpoint", "latest"],
                      [f"--output_dir={run}", "--resume_from_checkpoint=auto"],
                      ["--resume_from_checkpoint", checkpoint]):  # fmt: skip
        parsed = parse([*arguments, "--seed=6"])
        assert (parsed.output_dir, parsed.prediction_type) == (str(run), "sample")
        assert (parsed.seed, parsed.max_train_steps) == (6, 7)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--output_dir=~/run", "--resume_from_checkpoint=latest"]).prediction_type == "sample"

    assert parse(["--output_dir", str(run), "--seed=1"]).prediction_type == "v_prediction"  # a new run: the moons
    other = parse(["--output_dir", str(run), "--resume_from_checkpoint", "latest", *MOONS])
    assert other.prediction_type == "v_prediction"  # the data set is named, so the command line is whole
    new = parse([f"--output_dir={tmp_path / 'new'}", "--resume_from_checkpoint", "auto"])
    assert new.prediction_type == "v_prediction"
    with pytest.raises(SystemExit) as exit_:
        parse([f"--output_dir={tmp_path / 'new'}", "--resume_from_checkpoint", "latest"])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and "new'" in printed and "no config.yaml" in printed and printed.count("\n") == 1


def test_a_run_on_other_data_is_not_replaced_by_the_moons(tmp_path, capsys):
    """Only --output_dir, without data: what a user types who wants to go on."""
    arguments = ["--output_dir", str(tmp_path), "--max_train_steps", "2"]
    assert parse(arguments).dataset_name == "moons"
    (tmp_path / "config.yaml").write_text("dataset_name: moons\n")
    assert parse(arguments).dataset_name == "moons"
    (tmp_path / "config.yaml").write_text("dataset_name: null\ntrain_data_dir: cats\n")
    with pytest.raises(SystemExit) as exit_info:
        parse(arguments)
    assert exit_info.value.code == 2 and "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert parse([*arguments, "--dataset_name", "moons"]).dataset_name == "moons"
