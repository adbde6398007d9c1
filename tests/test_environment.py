"""The variables that accelerate reads from the environment: each is taken, ignored or refused, and docs say which."""

import os
import re
from pathlib import Path

import accelerate
import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.arrays import save_images
from tests.short_run import SHORT_RUN, flags, run_here
from training.run import checkpoint
from training.run.environment import check_environment, launched_precision
from training.run.runtime import resolve_mixed_precision

ROOT = Path(__file__).parents[1]

IGNORED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "ACCELERATE_DYNAMO_BACKEND": "eager",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "perhaps",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_DOWNCAST_BF16": "true",
}
HARMLESS = {  # what `accelerate launch` sets by itself
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "None",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "false",
}


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def run(folder, name):
    """The sha256 of what a run of two steps has learned."""
    options = {"output_dir": folder / name, "cache_dir": folder / "cache", "train_data_dir": folder / "images"}
    short = {"max_train_steps": 2, "train_batch_size": 2, "num_sample_images": 1, "ddpm_num_inference_steps": 1}
    assert run_here("train.py", flags(SHORT_RUN | short | options)) == 0
    _, manifest = checkpoint.find(folder / name, "latest")
    return manifest["files"]


def test_the_settings_of_a_run_win_over_the_environment(tmp_path, monkeypatch, capsys):
    save_images(tmp_path / "images", 4, 16, 16)
    plain = run(tmp_path, "plain")
    assert "in the environment" not in capsys.readouterr().out
    set_all(monkeypatch, IGNORED)
    assert run(tmp_path, "with variables") == plain
    printed = capsys.readouterr().out
    for name, value in IGNORED.items():
        assert f"{name} is {value!r} in the environment: ignored, the setting " in printed


def test_what_launchers_set_by_themselves_is_no_news(monkeypatch):
    set_all(monkeypatch, HARMLESS)
    assert check_environment() == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "True", "FSDP is not supported"),
        ("ACCELERATE_USE_FSDP", "1", "FSDP is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "yes", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism is not supported"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "SageMaker is not supported"),
        ("ACCELERATE_USE_CPU", "maybe", "give true or false"),
        ("ACCELERATE_DEBUG_MODE", "2", "give true or false"),
        ("ACCELERATE_TORCH_DEVICE", "moon", "moon"),
        ("ACCELERATE_TORCH_DEVICE", "", "Device"),
    ],
)
def test_what_a_run_cannot_do_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is '{value}' in the environment.*{message}"):
        check_environment()


@pytest.mark.parametrize(
    ("distributed_type", "settings", "prepare", "message"),
    [
        ("FSDP", "fsdp_config: {fsdp_version: 1}", prepare_multi_gpu_env, "FSDP is not supported"),
        ("FSDP", "fsdp_config: {fsdp_version: 2}", prepare_multi_gpu_env, "FSDP is not supported"),
        ("DEEPSPEED", "deepspeed_config: {zero_stage: 2}", prepare_deepspeed_cmd_env, "DeepSpeed is not supported"),
    ],
)
def test_what_accelerate_is_configured_for_is_refused(
    tmp_path, monkeypatch, distributed_type, settings, prepare, message
):
    """With the environment that `accelerate launch` makes of its configuration, on one of two machines."""
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        f"distributed_type: {distributed_type}\n{settings}\nnum_machines: 2\nnum_processes: 4\nmachine_rank: 1\n"
        "main_process_ip: 10.0.0.1\nmain_process_port: 29500\nmixed_precision: 'no'\nuse_cpu: false\n"
        "compute_environment: LOCAL_MACHINE\n"
    )
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments = launch._validate_launch_command(arguments)[0]
    arguments.deepspeed_fields_from_accelerate_config = ""  # as its launcher does
    made = prepare(arguments)
    set_all(monkeypatch, made[1] if isinstance(made, tuple) else made)
    with pytest.raises(ValueError, match=message):
        check_environment()


def test_one_device_for_several_processes_is_refused(monkeypatch):
    set_all(monkeypatch, {"WORLD_SIZE": "2", "ACCELERATE_TORCH_DEVICE": "meta"})
    with pytest.raises(ValueError, match=r"ACCELERATE_TORCH_DEVICE is 'meta'.* 2 processes"):
        check_environment()


def test_a_refusal_exits_with_2_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "dataset_name": "moons"}
    options |= {"ddpm_num_inference_steps": 2}
    assert run_here("train.py", flags(SHORT_RUN | options)) == 2
    assert "ACCELERATE_USE_FSDP" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_precision_of_the_launcher_is_that_of_auto(monkeypatch):
    for value, precision in (("bf16", "bf16"), ("BF16", "bf16"), ("no", "no")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
        assert launched_precision() == precision
        assert resolve_mixed_precision("auto") == precision or value == "no"  # then the hardware decides
        assert resolve_mixed_precision("no") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert resolve_mixed_precision("no") == "no"
    with pytest.raises(ValueError, match=r"ACCELERATE_MIXED_PRECISION is 'fp8'.*no, fp16, bf16"):
        resolve_mixed_precision("auto")


def test_docs_say_what_becomes_of_every_variable_that_accelerate_reads():
    """A later version of accelerate may read others: then a row of the table in docs/training.md is missing."""
    package = Path(accelerate.__file__).parent
    sources = [*package.glob("*.py"), *package.glob("utils/*.py")]
    read = set()
    for file in sources:
        if file.name not in ("launch.py", "megatron_lm.py"):
            read |= set(
                re.findall(r"[\"'](ACCELERATE_\w+|(?:FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_)[\"']", file.read_text())
            )
    assert len(read) > 25
    text = (ROOT / "docs" / "training.md").read_text()
    documented = re.findall(r"`([A-Z][A-Z0-9_]+)(\*?)`", text)
    for name in sorted(read):
        assert any(name == known or (star and name.startswith(known)) for known, star in documented), name


def test_nothing_is_left_for_accelerate_to_read(monkeypatch):
    set_all(monkeypatch, IGNORED)
    check_environment()
    assert not [name for name in IGNORED if name in os.environ]
    assert accelerate.utils.TorchDynamoPlugin().backend == accelerate.utils.DynamoBackend.NO
