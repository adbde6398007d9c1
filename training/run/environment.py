"""ENVIRONMENT: the variables that accelerate reads, each on purpose: taken, ignored, or refused.

A run is what its own settings say, on every machine. So what the environment may decide is where the run computes, not
what: the number of processes, the device, and the precision of `--mixed_precision auto`.

    taken     WORLD_SIZE and other variables of launchers, ACCELERATE_MIXED_PRECISION, ACCELERATE_TORCH_DEVICE, FLAGS
    ignored   names that begin with one of IGNORED: the run's own settings win
    refused   REFUSED: parallelism that train.py does not have
"""

from __future__ import annotations

import os

import torch

# What turns on a kind of parallelism that shards or replaces the model, which checkpoints and the EMA do not support.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "the data parallelism of SageMaker",
}
# Beginnings of names, and the setting of the run that decides instead.
IGNORED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
    "ACCELERATE_DYNAMO_": "compile",
    "ACCELERATE_FP8_": "mixed_precision",
    "ACCELERATE_DOWNCAST_BF16": "mixed_precision",
}
HARMLESS = ("", "no", "0", "1", "default", "false", "none")  # what a launcher sets where nothing was asked for
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
PRECISIONS = ("no", "fp16", "bf16")


def check_environment() -> list[str]:
    """Remove the variables that the run ignores from the environment. Returns a line for each that asked for something.

    Raises:
        ValueError: a variable asks for what train.py cannot do, or has a value that means nothing. Then it and the
            others that are refused are removed too, so that this process can still join the others to tell them.
    """
    mistakes = []
    for name in (*REFUSED, *FLAGS, "ACCELERATE_TORCH_DEVICE"):
        try:
            _check(name)
        except ValueError as error:
            mistakes.append(error)
            del os.environ[name]
    notes = []
    for name, setting in IGNORED.items():
        for variable in [variable for variable in os.environ if variable.startswith(name)]:
            value = os.environ.pop(variable)
            if value.lower() not in HARMLESS:
                notes.append(f"{variable} is {value!r} in the environment: ignored, the setting {setting} decides")
    if mistakes:
        raise mistakes[0]
    return notes


def launched_precision() -> str:
    """What `accelerate launch` was configured with: no, fp16 or bf16.

    Raises:
        ValueError: it is something else.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION is {precision!r} in the environment: give --mixed_precision, one of "
            f"{', '.join(PRECISIONS)}"
        )
    return precision


def _check(name: str) -> None:
    if name not in os.environ:
        return
    value = os.environ[name]
    if name == "ACCELERATE_TORCH_DEVICE":
        _check_device(value)
    elif _flag(name) and name in REFUSED:
        if name == "ACCELERATE_USE_SAGEMAKER" and os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") == "NO":
            return  # a single process
        raise ValueError(
            f"{name} is {value!r} in the environment: {REFUSED[name]} is not supported; unset it, or choose otherwise "
            "in `accelerate config`"
        )


def _flag(name: str) -> bool:
    value = os.environ[name].lower()
    if value not in TRUE + FALSE:
        raise ValueError(f"{name} is {os.environ[name]!r} in the environment: give true or false")
    return value in TRUE


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        reason = str(error).splitlines()[0]
        raise ValueError(f"ACCELERATE_TORCH_DEVICE is {name!r} in the environment: {reason}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.device(name).type != "cpu":
        raise ValueError(
            f"ACCELERATE_TORCH_DEVICE is {name!r} in the environment, and {os.environ['WORLD_SIZE']} processes share "
            "it: unset it, or set CUDA_VISIBLE_DEVICES"
        )
