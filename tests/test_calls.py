"""Several calls of one pipeline at once, callbacks, interruption, and a network in training mode."""

import copy
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ddpm_pipeline import DDPMScheduler
from tests.arrays import normal
from tests.gaussian import gaussian_images
from tests.models import tiny_pipe, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
T = 40


def sample(pipe, seed, steps, **options):
    return pipe(seeds=[seed], num_inference_steps=steps, output_type="latent", **options).images


class Meeting:
    """A callback at which all calls wait for each other after each of their first steps, so that they interleave."""

    def __init__(self, parties):
        self.barrier = threading.Barrier(parties)

    def __call__(self, pipe, i, t, tensors):
        if i < 5:
            self.barrier.wait(timeout=30)


@pytest.mark.parametrize(
    "make_scheduler",
    [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler,
     PNDMScheduler, DEISMultistepScheduler, HeunDiscreteScheduler],
)  # fmt: skip
def test_calls_at_once_give_what_they_give_alone(make_scheduler):
    pipe = tiny_pipe(num_train_timesteps=T)
    pipe.scheduler = make_scheduler.from_config(pipe.scheduler.config)
    steps = [7, 10, 20, 12]
    alone = [sample(pipe, seed, number) for seed, number in enumerate(steps)]
    meeting = Meeting(len(steps))
    with ThreadPoolExecutor(len(steps)) as pool:
        calls = [
            pool.submit(sample, pipe, seed, number, callback_on_step_end=meeting) for seed, number in enumerate(steps)
        ]
        for call, expected in zip(calls, alone):
            assert torch.equal(call.result(), expected)


def test_other_methods_at_once_give_what_they_give_alone():
    pipe, images = tiny_pipe(num_train_timesteps=T), gaussian_images(2, dtype=torch.float32)
    mask = torch.ones(8, 8, dtype=torch.bool)
    options = {"output_type": "latent", "return_dict": False}
    tasks = [
        lambda: pipe.invert(images, 7),
        lambda: pipe.invert(images[:1], 13),
        lambda: pipe.fuse(images[:1], images[1:], [0.3, 0.6], num_inference_steps=9, **options)[0],
        lambda: pipe.fuse(images[:1], images[1:], path="noise", timestep=20, seeds=1, **options)[0],
        lambda: pipe.vary(images, 0.7, 11, seeds=[1, 2], **options)[0],
        lambda: pipe.inpaint(images, mask, 8, seeds=[3, 4], **options)[0],
        lambda: list(pipe.trajectory(seeds=[5], num_inference_steps=6))[-1].x_0_pred,
    ]  # fmt: skip
    alone = [task() for task in tasks]
    with ThreadPoolExecutor(len(tasks)) as pool:
        for _ in range(3):
            for expected, actual in zip(alone, pool.map(lambda task: task(), tasks)):
                assert torch.equal(actual, expected)


def test_two_trajectories_can_be_read_in_turn():
    pipe = tiny_pipe(num_train_timesteps=T)
    options = [{"seeds": [1], "num_inference_steps": 4}, {"seeds": [2], "num_inference_steps": 8}]
    alone = [[step.x_t for step in pipe.trajectory(**each)][:4] for each in options]
    in_turn = list(zip(*(pipe.trajectory(**each) for each in options)))
    for first, second, step in zip(*alone, in_turn):
        assert torch.equal(step[0].x_t, first) and torch.equal(step[1].x_t, second)


def test_each_thread_reads_the_properties_of_its_own_call():
    pipe, images = tiny_pipe(num_train_timesteps=T, num_class_embeds=3), gaussian_images(2, dtype=torch.float32)
    meeting, seen = Meeting(2), {}

    def run(steps, scale):
        def look(pipe, i, t, tensors):
            meeting(pipe, i, t, tensors)
            seen.setdefault(steps, set()).add((pipe.num_timesteps, pipe.guidance_scale))

        sample(pipe, 0, steps, class_labels=1, guidance_scale=scale, callback_on_step_end=look)
        latents = pipe.invert(images[: 1 + (steps == 9)], steps, class_labels=1)
        meeting.barrier.wait(timeout=30)
        return len(pipe.inversion_error) == len(latents), pipe.num_timesteps

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (6, 9), (2.0, 3.0))) == [(True, 6), (True, 9)]
    assert seen == {6: {(6, 2.0)}, 9: {(9, 3.0)}}
    assert pipe.num_timesteps in (6, 9) and pipe.inversion_error is not None  # the last one, in a thread without calls
    assert len(pipe.scheduler.timesteps) in (6, 9)


def test_an_interrupt_stops_the_calls_that_run_and_no_later_one():
    pipe, started, ready = tiny_pipe(num_train_timesteps=T), threading.Event(), threading.Event()
    steps = []

    def wait(pipe, i, t, tensors):
        steps.append(i)
        started.set()
        assert ready.wait(timeout=30)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sample, pipe, 1, 20, callback_on_step_end=wait)
        assert started.wait(timeout=30)
        pipe.interrupt = True
        assert pipe.interrupt
        complete = sample(pipe, 2, 20)  # another call does not take it back
        ready.set()
        running.result()
    assert steps == [0]
    assert not pipe.interrupt and torch.equal(complete, sample(pipe, 2, 20))


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_a_callback_interrupts_its_own_call(name):
    pipe, meeting = tiny_pipe(num_train_timesteps=T), Meeting(2)
    steps = {1: 0, 2: 0}

    def run(seed):
        def count(pipe, i, t, tensors):
            steps[seed] += 1
            meeting(pipe, i, t, tensors)
            if seed == 1 and i == 4:
                setattr(pipe, name, True)

        return sample(pipe, seed, 20, callback_on_step_end=count)

    with ThreadPoolExecutor(2) as pool:
        _, complete = pool.map(run, (1, 2))
    assert steps == {1: 5, 2: 20} and torch.equal(complete, sample(pipe, 2, 20))


def test_a_callback_may_call_the_pipeline():
    pipe, numbers = tiny_pipe(num_train_timesteps=T), []

    def preview(pipe, i, t, tensors):
        sample(pipe, 9, 3)
        numbers.append(pipe.num_timesteps)

    assert torch.equal(sample(pipe, 1, 6, callback_on_step_end=preview), sample(pipe, 1, 6))
    assert numbers == [3] * 6


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_pipeline_that_was_called_can_be_copied(make):
    pipe = tiny_pipe(num_train_timesteps=T)
    expected = sample(pipe, 1, 6)
    assert torch.equal(sample(make(pipe), 1, 6), expected)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"prompt": 1}, r"\['prompt'\]"),
        ({"latents": normal(1, 1, 8, 8), "latent": 2}, r"\['latent'\]"),
        ({"latents": None}, "latents None"),
        ({"latents": normal(1, 1, 4, 4)}, r"\(1, 1, 4, 4\).*\(1, 1, 8, 8\)"),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "torch.int64"),
        ({"latents": torch.full((1, 1, 8, 8), math.nan)}, "latents that are nan"),
        (3, "returned 3"),
    ],
)
def test_what_a_callback_returns_is_checked(returned, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_pipe(num_train_timesteps=T), 1, 3, callback_on_step_end=lambda *_: returned)


# ---- A network in training mode --------------------------------------------------------------------------------------


def training_pipe():
    unet = tiny_unet(dropout=0.5).train()
    unet.down_blocks[0].eval()  # a part that is frozen stays so
    return tiny_pipe(num_train_timesteps=T, unet=unet)


def modes(pipe):
    return [module.training for module in pipe.unet.modules()]


METHODS = {
    "call": lambda p, x: p(seeds=[1, 2], num_inference_steps=3, output_type="latent").images,
    "trajectory": lambda p, x: list(p.trajectory(seeds=[1], num_inference_steps=3))[-1].x_0_pred,
    "invert": lambda p, x: p.invert(x, 3),
    "fuse": lambda p, x: p.fuse(x[:1], x[1:], num_inference_steps=3, output_type="latent").images,
    "vary": lambda p, x: p.vary(x, 0.8, 3, seeds=[1, 2], output_type="latent").images,
    "inpaint": lambda p, x: p.inpaint(x, torch.ones(8, 8), 3, seeds=[1, 2], output_type="latent").images,
}


@pytest.mark.parametrize("name", METHODS)
def test_no_dropout_while_sampling(name):
    images, pipe = gaussian_images(2, dtype=torch.float32), training_pipe()
    before = modes(pipe)
    assert True in before and False in before
    expected = METHODS[name](tiny_pipe(num_train_timesteps=T, unet=tiny_unet(dropout=0.5)), images)
    assert torch.equal(METHODS[name](pipe, images), expected)
    assert modes(pipe) == before


def test_the_mode_is_put_back_after_errors_interrupts_and_other_threads():
    pipe = training_pipe()
    before, expected = modes(pipe), sample(training_pipe(), 1, 20)

    def fail(pipe, i, t, tensors):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        sample(pipe, 1, 20, callback_on_step_end=fail)
    next(pipe.trajectory(seeds=[1]))  # never finished
    assert modes(pipe) == before
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(sample, pipe, 1, 20) for _ in range(8)]
        calls += [pool.submit(sample, pipe, 1, 3, callback_on_step_end=fail) for _ in range(4)]
    for call in calls[:8]:
        assert torch.equal(call.result(), expected)
    assert modes(pipe) == before


# ---- What a pipeline tells ------------------------------------------------------------------------------------------


def test_the_bar_says_that_all_steps_are_taken(capsys):
    pipe = tiny_pipe(num_train_timesteps=60)
    pipe.set_progress_bar_config(disable=False)
    pipe(seeds=[1])
    assert "num_inference_steps=50 is faster" in capsys.readouterr().err
    for options in ({"num_inference_steps": 60}, {"timesteps": range(59, -1, -1)}):
        pipe(seeds=[1], **options)
        assert "faster" not in capsys.readouterr().err
    assert "diffusion timesteps" in type(pipe).__call__.__doc__


def test_the_text_of_a_pipeline_names_its_classes():
    pipe = tiny_pipe(num_train_timesteps=T)
    assert "scheduler=ddpm_pipeline.scheduling_ddpm.DDPMScheduler" in repr(pipe) == str(pipe)
    pipe.scheduler = DDIMScheduler(T)
    assert "scheduler=diffusers.schedulers.scheduling_ddim.DDIMScheduler" in repr(pipe)
    assert "unet=diffusers.models.unets.unet_2d.UNet2DModel" in repr(pipe)
