"""Settings: a mistake ends with exit code 2 and its value in the message, before anything is built."""

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ddpm_pipeline.scheduling_ddpm import BETA_SCHEDULES
from training.config import CONFIGS, Config, parse
from training.denoiser import PRESETS

ROOT = Path(__file__).parents[1]
MOONS = ("--dataset_name", "moons")
NEEDS_DATA = {"mnist.yaml": [], "tiles.yaml": ["--train_data_dir", "tiles"]}


def config(**options):
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
        ("--gradient_accumulation_steps 0", "0"),
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
        ("--denoiser huge", "huge"),
        ("--ddpm_num_steps 20 --ddpm_num_inference_steps 21", "21"),
        ("--mixed_precision fp8", "fp8"),
        ("--on_bad_image ignore", "ignore"),
        ("--checkpointing_steps 0", "0"),
        ("--checkpoints_total_limit 0", "0"),
        ("--logging_steps 0", "0"),
        ("--num_sample_images 0", "0"),
        ("--save_images_steps -1", "-1"),
        ("--dataloader_num_workers -1", "-1"),
        ("--train_data_dir pictures", "pictures"),  # beside --dataset_name
    ],
)
def test_a_mistake_ends_with_2_and_its_value(arguments, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse([*MOONS, *arguments.split()])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert value in message
    assert arguments.split()[-2].lstrip("-") in message
    assert "Traceback" not in message


def test_an_unknown_key_in_a_file_ends_with_2(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for content, value in (("batch: 3", "batch"), ("seed: x", "x"), ("seed: [1", "seed")):
        file.write_text(f"dataset_name: moons\n{content}\n")
        with pytest.raises(SystemExit) as exit_:
            parse(["--config", str(file)])
        assert exit_.value.code == 2
        assert value in capsys.readouterr().err


def test_without_a_data_set_one_is_told_to_give_one(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as exit_:
        parse(["--config", str(tmp_path / "empty.yaml")])
    assert exit_.value.code == 2
    assert "give one of them" in capsys.readouterr().err


def test_accelerate_launch_passes_the_mistake_on(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "training/train.py", "--learning_rat", "1"]
    command += ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "learning_rat" in child.stderr
    assert child.returncode != 0
    assert "exit status 2" in child.stderr  # that of train.py; accelerate itself ends with 1
    assert not (tmp_path / "run").exists()


# ---- Where settings come from ----------------------------------------------------------------------------------------


def test_no_arguments_are_the_moons():
    assert parse([]) == parse(["--config", str(CONFIGS / "moons.yaml")])
    assert parse([]).dataset_name == "moons"
    assert parse(["--seed", "3"]) == parse(["--config", str(CONFIGS / "moons.yaml"), "--seed=3"])
    assert parse(["--resolution", "16"]).height_width == 16  # the file says 32
    # A data set that is named is not trained with the moons' settings.
    assert parse([*MOONS]) == config()
    assert parse(["--dataset_name=moons"]) == config()
    assert parse(["--train_data_dir=pictures"]) == Config(train_data_dir="pictures")


def test_later_arguments_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: moons\nseed: 5\nlearning_rate: 1.0e-3\nresolution: 16\nmax_train_minutes: 2\n")
    from_file = {"seed": 5, "learning_rate": 1e-3, "resolution": 16, "max_train_minutes": 2.0}
    assert parse(["--config", str(file)]) == config(**from_file)
    changed = parse(["--config", str(file), "--seed", "7", "--resolution", "8x16", "--max_train_minutes", "null"])
    assert changed == config(**from_file | {"seed": 7, "resolution": "8x16", "max_train_minutes": None})
    assert parse(["--seed", "7", "--config", str(file)]).seed == 5
    folder = parse(["--config", str(file), "--dataset_name", "null", "--train_data_dir", "pictures"])
    assert (folder.dataset_name, folder.train_data_dir) == (None, "pictures")


def test_a_switch_alone_is_true():
    assert parse([*MOONS, "--random_flip"]).random_flip
    assert parse(["--random_flip", *MOONS]).random_flip
    assert parse([*MOONS, "--random_flip", "true"]).random_flip
    assert not parse([*MOONS, "--center_crop", "false"]).center_crop
    assert not parse(MOONS).random_flip


def test_numbers_may_be_written_with_an_exponent():
    parsed = parse([*MOONS, "--learning_rate", "1e-3", "--adam_epsilon", "1e-9"])
    assert (parsed.learning_rate, parsed.adam_epsilon) == (1e-3, 1e-9)


def test_resolution_as_numbers():
    for given, expected in ((None, None), (16, 16), ("16", 16), ("16x24", (16, 24))):
        assert config(resolution=given).height_width == expected


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_parses_and_can_be_written_and_read_again(file, tmp_path):
    more = NEEDS_DATA.get(file.name, [])
    preset = parse(["--config", str(file), *more])
    for name, value in yaml.safe_load(file.read_text()).items():
        assert getattr(preset, name) == value
    copy = tmp_path / "config.yaml"
    copy.write_text(yaml.safe_dump(preset.as_dict(), sort_keys=False))
    assert parse(["--config", str(copy)]) == preset


def test_choices_are_those_of_the_parts_that_use_them(capsys):
    for name, choices in (("denoiser", PRESETS), ("ddpm_beta_schedule", BETA_SCHEDULES)):
        for choice in choices:
            assert getattr(parse([*MOONS, f"--{name}", choice]), name) == choice
        with pytest.raises(SystemExit):
            parse([*MOONS, f"--{name}", "none of them"])
        message = capsys.readouterr().err
        assert all(choice in message for choice in choices)


def test_every_setting_is_explained():
    documented = [line.split(":")[0].strip() for line in Config.__doc__.splitlines() if line.startswith("        ")]
    assert [name for name in documented if name in {field.name for field in fields(Config)}] == [
        field.name for field in fields(Config)
    ]


def test_cifar10_has_the_numbers_of_ho_et_al_2020():
    """Section 4 and appendix B: what the paper states for CIFAR-10."""
    cifar10 = parse(["--config", str(CONFIGS / "cifar10.yaml")])
    paper = {
        "resolution": 32,
        "ddpm_num_steps": 1000,
        "ddpm_beta_schedule": "linear",  # from 1e-4 to 0.02, which are the scheduler's defaults
        "prediction_type": "epsilon",
        "variance_type": "fixed_large",  # their sampler's choice for CIFAR-10
        "train_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 800_000,
        "max_train_minutes": None,
        "learning_rate": 2e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 5000,  # of their program
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 0.0,  # so AdamW is their Adam
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,  # of their program
        "ema_max_decay": 0.9999,
        "random_flip": True,
    }
    assert {name: getattr(cifar10, name) for name in paper} == paper
    network = PRESETS[cifar10.denoiser]
    assert network["block_out_channels"] == (128, 256, 256, 256)
    assert network["dropout"] == 0.1
    assert [i for i, kind in enumerate(network["down_block_types"]) if "Attn" in kind] == [1]  # at 16 x 16


# ---- The learning rate -----------------------------------------------------------------------------------------------


def test_learning_rate_at_the_corners():
    options = {"learning_rate": 0.1, "lr_warmup_steps": 10, "max_train_steps": 110}
    constant, linear, cosine = (
        config(**options, lr_scheduler=kind).learning_rate_at for kind in ("constant", "linear", "cosine")
    )
    for rate in (constant, linear, cosine):
        assert rate(1) == pytest.approx(0.01)
        assert rate(5) == pytest.approx(0.05)
        assert rate(10) == rate(11) == 0.1
        values = [rate(step) for step in range(1, 111)]
        assert min(values) > 0  # no step is in vain
        assert all(before >= after for before, after in zip(values[10:], values[11:]))
    assert constant(110) == constant(10**9) == 0.1
    assert linear(61) == pytest.approx(0.05)
    assert linear(110) == pytest.approx(0.001)  # it would be 0 at the step that is not done any more
    assert linear(111) == linear(10**9) == 0
    assert cosine(36) == pytest.approx(0.1 * math.cos(math.pi / 8) ** 2)
    assert cosine(61) == pytest.approx(0.05)
    assert cosine(110) == pytest.approx(0.1 * math.sin(math.pi / 200) ** 2)
    assert cosine(111) == pytest.approx(0, abs=1e-17)


def test_learning_rate_is_that_of_optimizer_steps():
    one = config(lr_scheduler="cosine", max_train_steps=1000)
    four = config(lr_scheduler="cosine", max_train_steps=1000, gradient_accumulation_steps=4, train_batch_size=16)
    assert [one.learning_rate_at(step) for step in (1, 500, 501, 1000)] == [
        four.learning_rate_at(step) for step in (1, 500, 501, 1000)
    ]


def test_a_warm_up_of_no_step_and_one_longer_than_the_run():
    assert config(lr_warmup_steps=0, learning_rate=0.1).learning_rate_at(1) == 0.1
    assert config(lr_warmup_steps=20, learning_rate=0.1, max_train_steps=10, lr_scheduler="cosine").learning_rate_at(
        10
    ) == pytest.approx(0.05)


def test_other_data_named_on_the_command_line_replace_those_of_a_preset():
    preset = f"--config={CONFIGS / 'mnist.yaml'}"
    config = parse([preset, "--train_data_dir", "images"])
    assert (config.train_data_dir, config.dataset_name) == ("images", None)
    assert parse(["--train_data_dir=images", preset]).dataset_name is None
    tiles = parse([f"--config={CONFIGS / 'tiles.yaml'}", "--dataset_name=moons"])
    assert (tiles.train_data_dir, tiles.dataset_name) == (None, "moons")
    with pytest.raises(SystemExit):
        parse([preset, "--train_data_dir=images", "--dataset_name=moons"])


def test_help_says_what_each_flag_means(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "folder of image files, at any depth" in text
    assert "every random number" in text
