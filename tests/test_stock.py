"""Where diffusers' DDPMScheduler and DDPMPipeline are wrong, slow or silent, and ours are not: one row per case.

A row measures the same quantity on both. The built-in result is checked too: a test fails once diffusers fixes it.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipeline.pipeline_ddpm import DDPMPipeline
from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
from tests.models import tiny_unet

BUILT_IN = SimpleNamespace(Scheduler=BuiltInDDPMScheduler, Pipeline=BuiltInDDPMPipeline, Ddim=DDIMScheduler, ddim={})
OURS = SimpleNamespace(Scheduler=DDPMScheduler, Pipeline=DDPMPipeline, Ddim=DDPMScheduler, ddim={"ddim_eta": 0.0})


class Row(NamedTuple):
    number: int
    case: str
    measure: Callable[[SimpleNamespace], Any]
    built_in: Callable[[Any], bool]
    ours: Callable[[Any], bool]


ROWS: list[Row] = []


def row(number, built_in, ours):
    """Add a measurement; its result must satisfy one condition for the built-in classes and another for ours."""

    def add(measure):
        ROWS.append(Row(number, measure.__name__, measure, built_in, ours))
        return measure

    return add


def outcome(call, *args, **kwargs):
    """The result of a call, or the exception that it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error


def rejected(error, *fragments):
    return isinstance(error, ValueError) and all(fragment in str(error) for fragment in fragments)


def ramp(*shape):
    """Distinct numbers in [-1, 1]."""
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def noise_like(images, seed=0):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def small_pipe(kind, num_train_timesteps=4, **options):
    pipe = kind.Pipeline(tiny_unet(**options), kind.Scheduler(num_train_timesteps))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- The scheduler ---------------------------------------------------------------------------------------------------


def sample_trailing(kind, number, image):
    """The sample of a model that is exact for data where every pixel is `image`."""
    scheduler = kind.Scheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(number)
    x_t = torch.full((1, 1, 1, 1), 0.7)
    for t in scheduler.timesteps.tolist():
        alpha_bar_t = scheduler.alphas_cumprod[t].item()
        eps = (x_t - math.sqrt(alpha_bar_t) * image) / math.sqrt(1 - alpha_bar_t)
        if t == -1:  # the clean image, with no noise in it
            eps = torch.zeros_like(eps)
        x_t = scheduler.step(eps, t, x_t, generator=torch.Generator().manual_seed(t + 1)).prev_sample
    return x_t.item()


@row(
    1,
    built_in=lambda r: len(r[0]) == 62 and {61, 103, 121, 122, 201} <= set(r[0]) and r[1] == pytest.approx(1, abs=1e-3),
    ours=lambda r: r[0] == [] and r[1] == pytest.approx(0.3, abs=1e-6),
)
def trailing_spacing_has_one_step_too_many(kind):
    scheduler = kind.Scheduler(timestep_spacing="trailing")
    wrong = []
    for number in range(1, 1001):
        scheduler.set_timesteps(number)
        steps = scheduler.timesteps
        if len(set(steps.tolist())) != number or steps.min() < 0 or steps.max() > 999:
            wrong.append(number)
    return wrong, sample_trailing(kind, 61, image=0.3)


@row(2, built_in=lambda std: std == pytest.approx(0.3216, abs=0.01), ours=lambda std: std == 0)
def the_last_step_adds_noise(kind):
    scheduler = kind.Scheduler(timestep_spacing="trailing", variance_type="fixed_large")
    scheduler.set_timesteps(10)
    grey = torch.zeros(1, 1, 64, 64)  # std of a std from 4096 numbers: 0.0036
    return scheduler.step(grey, 99, grey, generator=torch.Generator().manual_seed(0)).prev_sample.std().item()


@row(
    3,
    built_in=lambda r: r == ([500, 599, 897, 0], []),
    ours=lambda r: r[0] == [500, 599, 897, 0] and len(r[1]) == 4 and all("trailing" in text for text in r[1]),
)
def leading_spacing_starts_in_the_middle_without_a_warning(kind):
    scheduler = kind.Scheduler(timestep_spacing="leading")
    starts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in (501, 600, 300, 1):
            scheduler.set_timesteps(number)
            starts.append(scheduler.timesteps[0].item())
    return starts, [str(warning.message) for warning in caught]


@row(
    4,
    built_in=lambda r: r[0].isnan().all(),
    ours=lambda r: torch.equal(r[0], r[1]) and not torch.equal(r[0], r[2]),
)
def fixed_large_log_uses_a_logarithm_as_a_variance(kind):
    x = ramp(2, 1, 4, 4)

    def step(variance_type):
        scheduler = kind.Scheduler(variance_type=variance_type)
        return scheduler.step(x.flip(2), 10, x, generator=torch.Generator().manual_seed(0)).prev_sample

    return step("fixed_large_log"), step("fixed_large"), step("fixed_small")


@row(
    5,
    built_in=lambda r: r[0].isnan().all() and all(isinstance(error, TypeError) for error in r[1:]),
    ours=lambda r: (
        torch.allclose(r[0], torch.full_like(r[0], math.exp(-2.0)), atol=1e-5)
        and all(rejected(error, "6 channels", "(1, 3, 4, 4)") for error in r[1:])
    ),
)
def learned_variance(kind):
    """Added noise divided by drawn noise for a predicted log-variance of -4; and a model without these channels."""
    x, eps = ramp(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    scheduler = kind.Scheduler(variance_type="learned")
    output = torch.cat([eps, torch.full_like(eps, -4.0)], dim=1)
    mean = DDPMScheduler().step(eps, 500, x, variance_noise=eps).prev_sample
    stepped = scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    return (stepped - mean) / noise_like(x), *(
        outcome(kind.Scheduler(variance_type=variance_type).step, eps, 500, x)
        for variance_type in ("learned", "learned_range")
    )


@row(
    6, built_in=lambda r: not r.isfinite().any(), ours=lambda r: rejected(r, '"epsilon"', '"v_prediction"', '"sample"')
)
def zero_terminal_snr_with_epsilon(kind):
    def first_step():
        scheduler = kind.Scheduler(rescale_betas_zero_snr=True, clip_sample=False)
        return scheduler.step(ramp(1, 1, 4, 4), 999, ramp(1, 1, 4, 4)).prev_sample

    return outcome(first_step)


@row(7, built_in=lambda beta_end: beta_end == 0.02, ours=lambda beta_end: beta_end == 0.03)
def positional_arguments_are_lost_in_the_config(kind):
    scheduler = kind.Scheduler(1000, 1e-4, 0.03)
    return kind.Scheduler.from_config(scheduler.config).config.beta_end


@row(
    8,
    built_in=lambda silent: silent == {"fp16": [0, 1], "bf16": 10, "first of bf16": [*range(6)], "bf16, cosine": 21},
    ours=lambda silent: silent == {"fp16": [], "bf16": 0, "first of bf16": [], "bf16, cosine": 0},
)
def half_precision_images_get_no_noise(kind):
    def silent(dtype, **options):
        noise, t = torch.ones(1000, 1, 1, 1, dtype=dtype), torch.arange(1000)
        noisy = kind.Scheduler(**options).add_noise(torch.zeros_like(noise), noise, t)
        return t[noisy.flatten() == 0].tolist()

    bf16 = silent(torch.bfloat16)
    return {
        "fp16": silent(torch.float16),
        "bf16": len(bf16),
        "first of bf16": bf16[:6],
        "bf16, cosine": len(silent(torch.bfloat16, beta_schedule="squaredcos_cap_v2")),
    }


@row(12, built_in=lambda r: isinstance(r, Exception), ours=lambda r: torch.equal(*r))
def an_image_on_another_device_moves_the_tables(kind):
    scheduler, x, t = kind.Scheduler(), ramp(2, 1, 4, 4), torch.tensor([3, 500])

    def step():
        return scheduler.step(x, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample

    before = step()
    on_meta = x.to("meta")
    scheduler.add_noise(on_meta, on_meta, t)
    scheduler.get_velocity(on_meta, on_meta, t)
    return outcome(lambda: (before, step()))


class Count(TorchDispatchMode):
    """Names of the tensor operations dispatched within the context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@row(13, built_in=lambda r: r[0] > 50 and r[1] > 10, ours=lambda r: r[0] <= 10 and r[1] == 0)
def one_step_is_many_operations(kind):
    """Tensor operations in one step, and how many of them make the host wait."""
    scheduler, x = kind.Scheduler(), ramp(2, 3, 4, 4)
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[10]
    scheduler.step(x, t, x)  # the first call computes the coefficients of the whole schedule
    with Count() as count:
        scheduler.step(x, t, x)
    return len(count.names), count.names.count("_local_scalar_dense")


@row(
    14,
    built_in=lambda r: isinstance(r, Exception) and "Data-dependent branching" in str(r),
    ours=lambda r: max(r[0]) < 1e-6 and r[1] <= 2,
)
def step_cannot_be_compiled(kind):
    """The largest difference from the uncompiled step at each t, and the number of graphs compiled for all of them."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compiled():
        scheduler, x = kind.Scheduler(clip_sample=False), ramp(2, 1, 4, 4)
        scheduler.set_timesteps(50)
        options = {"variance_noise": noise_like(x)} if kind is OURS else {}
        step = torch.compile(scheduler.step, fullgraph=True, backend=backend)
        differences = []
        for t in (*scheduler.timesteps[::7], scheduler.timesteps[-1]):
            stepped = step(x.flip(2), t, x, **options).prev_sample
            differences.append((stepped - scheduler.step(x.flip(2), t, x, **options).prev_sample).abs().max().item())
        return differences, len(graphs)

    return outcome(compiled)


@row(15, built_in=lambda r: isinstance(r, IndexError), ours=lambda r: rejected(r, "1000", "steps_offset=1"))
def an_offset_beyond_the_last_timestep(kind):
    def start():
        scheduler, x = kind.Scheduler(steps_offset=1), ramp(1, 1, 4, 4)
        scheduler.set_timesteps(1000)
        return scheduler.step(x, scheduler.timesteps[0], x)

    return outcome(start)


@row(
    16,
    built_in=lambda r: [type(error) for error in r] == [IndexError, RuntimeError, AttributeError],
    ours=lambda r: (
        rejected(r[0], "501", "980, 960") and rejected(r[1], "2 elements", "980, 960", "p_mean_variance")
        and r[2].mean.shape == (2, 1, 4, 4)
    ),
)  # fmt: skip
def timesteps_outside_the_schedule(kind):
    scheduler, x = kind.Scheduler(), ramp(2, 1, 4, 4)
    scheduler.set_timesteps(50)
    t = torch.tensor([501, 500])
    return [
        outcome(scheduler.step, x, 501, x),
        outcome(scheduler.step, x, t, x),
        outcome(lambda: scheduler.p_mean_variance(x, t, x)),
    ]


@row(
    17,
    built_in=lambda errors: errors == pytest.approx((3.9e-4, 4.1e-3), rel=0.05),
    ours=lambda errors: max(errors) < 1e-6,
)
def tables_in_float32(kind):
    """The largest relative error of the posterior variance, T = 1000 and T = 10000 with a tenth of the betas."""
    errors = []
    for num_steps in (1000, 10000):
        first, last = 0.1 / num_steps, 20 / num_steps
        scheduler = kind.Scheduler(num_steps, beta_start=first, beta_end=last)
        alpha_bar, worst = 1.0, 0.0
        for t in range(200):  # the largest are at the start, where 1 - alpha_bar is small
            beta = first + (last - first) * t / (num_steps - 1)
            alpha_bar_prev, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
            if t > 0:
                exact = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
                worst = max(worst, abs(scheduler._get_variance(t).item() / exact - 1))
        errors.append(worst)
    return tuple(errors)


@row(
    18,
    built_in=lambda r: r[0] and isinstance(r[1], RuntimeError) and "too large" in str(r[1]),
    ours=lambda r: r[0] and r[1] == pytest.approx((1.5 * 0.995, 1.0), abs=1e-6),
)
def thresholding(kind):
    """Whether the default threshold equals clipping; s and the maximum of an image with 17 million values."""
    x = 3 * ramp(1, 3, 8, 8)
    clipped = torch.equal(kind.Scheduler(thresholding=True)._threshold_sample(x), x.clamp(-1, 1))

    def large():
        side = 4124
        image = torch.linspace(0, 1.5, side * side).view(1, 1, side, side)
        bounded = kind.Scheduler(thresholding=True, sample_max_value=2.0)._threshold_sample(image)
        middle = side // 2
        return (image[0, 0, middle, 0] / bounded[0, 0, middle, 0]).item(), bounded.max().item()

    return clipped, outcome(large)


@row(
    19,
    built_in=lambda r: not any(isinstance(error, ValueError) for error in r.values()),
    ours=lambda r: all(rejected(error, value) for value, error in r.items()),
)
def bad_values_are_accepted(kind):
    scheduler = kind.Scheduler()
    return {
        "fixed_smal": outcome(kind.Scheduler, variance_type="fixed_smal"),
        "beta is 1.0": outcome(kind.Scheduler, beta_end=2.0),
        "-3": outcome(scheduler.set_timesteps, timesteps=[500, -3]),
        "num_inference_steps is 0": outcome(scheduler.set_timesteps, 0),
        "'tensor'": outcome(small_pipe(kind), num_inference_steps=1, output_type="tensor"),
        "sample_size None": outcome(small_pipe(kind, sample_size=None), num_inference_steps=1),
    }


@row(20, built_in=lambda r: r == [], ours=lambda r: len(r) == 1 and "255" in r[0] and "[-1, 1]" in r[0])
def images_in_0_to_255(kind):
    scheduler, x = kind.Scheduler(), (ramp(2, 1, 4, 4) + 1) * 127.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in (0, 500):
            scheduler.add_noise(x, noise_like(x), torch.tensor([t, t]))
    return [str(warning.message) for warning in caught]


@row(22, built_in=lambda number: number == 50, ours=lambda number: number == 3)
def custom_timesteps_keep_the_old_count(kind):
    scheduler = kind.Scheduler()
    scheduler.set_timesteps(50)
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    return scheduler.num_inference_steps


@row(23, built_in=lambda error: error > 1e-3, ours=lambda error: error < 1e-6)
def ddim_leaves_the_schedule(kind):
    """Error of x_prev for a model that knows x_0 and eps: the largest over 7 linspace steps."""
    scheduler = kind.Ddim(timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(7)
    x_0, eps, worst = ramp(1, 1, 4, 4), noise_like(ramp(1, 1, 4, 4)), 0.0
    steps = scheduler.timesteps
    for t, prev_t in zip(steps, steps[1:]):
        x_prev = scheduler.step(eps, t, scheduler.add_noise(x_0, eps, t[None]), **kind.ddim).prev_sample
        worst = max(worst, (x_prev - scheduler.add_noise(x_0, eps, prev_t[None])).abs().max().item())
    return worst


# ---- The pipeline ----------------------------------------------------------------------------------------------------


@row(
    9,
    built_in=lambda r: "class_labels" in str(r[0]) and all(isinstance(error, Exception) for error in r),
    ours=lambda r: rejected(r[0], "class_labels", "[0, 3)") and r[1].images.shape == (2, 8, 8, 1),
)
def networks_with_classes(kind):
    pipe = small_pipe(kind, num_class_embeds=3)
    return (
        outcome(pipe, num_inference_steps=4),
        outcome(pipe, num_inference_steps=4, class_labels=[0, 1], guidance_scale=2.0, output_type="np"),
    )


@row(
    10,
    built_in=lambda r: len(r[0]) == 6 and isinstance(r[1], TypeError),
    ours=lambda r: r[0] == set() and r[1] == ([3, 1], (1, 16, 8, 1)),
)
def arguments_of_a_call(kind):
    """Arguments of other pipelines that are missing; timesteps until a callback interrupts, and the image shape."""
    common = {"latents", "timesteps", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "height", "width"}
    pipe, seen = small_pipe(kind), []

    def callback(pipe, step, t, tensors):
        seen.append(t)
        pipe.interrupt = t == 1
        return tensors

    def call():
        latents = noise_like(torch.empty(1, 1, 16, 8))
        options = {"latents": latents, "height": 16, "width": 8, "timesteps": [3, 1, 0], "output_type": "np"}
        return seen, pipe(callback_on_step_end=callback, **options).images.shape

    return common - set(inspect.signature(kind.Pipeline.__call__).parameters), outcome(call)


@row(11, built_in=lambda r: rejected(r, "1000"), ours=lambda r: r == 7)
def the_default_steps_of_a_short_schedule(kind):
    """Sampling steps of a call without arguments, for a model that was trained with T = 7."""
    pipe = small_pipe(kind, num_train_timesteps=7)

    def steps():
        pipe(output_type="np")
        return len(pipe.scheduler.timesteps)

    return outcome(steps)


@row(21, built_in=lambda dtype: dtype == torch.float32, ours=lambda dtype: dtype == torch.float16)
def from_pipe_casts_its_source(kind):
    source = small_pipe(kind).to(torch.float16)
    kind.Pipeline.from_pipe(source)
    return source.unet.dtype


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.number}-{row.case}") for row in sorted(ROWS)])
def test_row(row):
    theirs, ours = row.measure(BUILT_IN), row.measure(OURS)
    assert row.built_in(theirs), f"built-in: {theirs}"
    assert row.ours(ours), f"ours: {ours}"


def test_every_row_has_a_test():
    assert sorted(row.number for row in ROWS) == list(range(1, 24))
