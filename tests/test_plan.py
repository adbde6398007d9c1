"""The plan of a run: memory against closed forms, the batch that fits, and the network that is fast enough."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

from tests.short_run import fresh_accelerate
from training import plan
from training.budget import Budget
from training.config import Config
from training.denoiser import FAMILIES, make_denoiser
from training.plan import Memory, Passes, fit_passes, measure_memory
from training.run.runtime import Runtime

GB = 1e9


@pytest.fixture
def runtime():
    with fresh_accelerate():
        yield Runtime("no", 1)


def config(train_batch_size, **options):
    return Config(dataset_name="moons", train_batch_size=train_batch_size, **options)


class Squares(torch.nn.Module):
    """x^2, which keeps x for its backward pass, and nothing else."""

    config = SimpleNamespace(__getitem__=None)

    def __init__(self):
        super().__init__()
        self.config = {"num_class_embeds": None}
        self.weight = torch.nn.Parameter(torch.ones(1000))

    def forward(self, x_t, t, labels, return_dict):
        return (x_t.requires_grad_() * x_t,)


def test_memory_of_what_is_kept(runtime):
    memory = measure_memory(Squares(), (3, 8, 16), runtime)
    assert memory.per_image == plan.KEPT * 4 * 3 * 8 * 16
    assert memory.fixed == plan.LIBRARIES + plan.WEIGHTS * 4 * 1000
    assert measure_memory(Squares(), (3, 8, 16), runtime, 2).fixed == memory.fixed + 2 * 4 * 1000  # --post_hoc_ema


def test_memory_grows_with_the_images_and_leaves_no_trace(runtime):
    torch.manual_seed(0)
    unet = make_denoiser("tiny", height=16, width=16, in_channels=3, dropout=0.1).eval()
    torch.manual_seed(1)
    two, three, six = (plan._kept_bytes(unet, (3, 16, 16), number, runtime) for number in (2, 3, 6))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    assert six - two == pytest.approx(4 * (three - two), rel=0.02)
    assert not unet.training and all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("train_batch_size", "of_rank", "available", "expected"),
    [
        ("auto", 64, 100 * GB, (64, 1)),
        ("auto", 64, 12.6 * GB, (8, 8)),  # 80 % of it: 10 images fit
        ("auto", 63, 12.6 * GB, (9, 7)),
        ("auto", 64, 1.4 * GB, (1, 64)),
        (64, 128, 65 * GB, (64, 2)),  # what was asked for may take all
    ],
)
def test_the_largest_batch_that_fits(train_batch_size, of_rank, available, expected):
    memory = Memory(fixed=0.05 * GB, per_image=1 * GB)
    assert fit_passes(config(train_batch_size), of_rank, memory, available) == Passes(*expected)


def test_what_does_not_fit_is_refused_with_what_does():
    memory = Memory(fixed=1 * GB, per_image=0.5 * GB)
    with pytest.raises(ValueError, match=r"train_batch_size is 64, .* 33\.0 GB, .* 10\.0 GB are free: give "
                       "--train_batch_size 8 --gradient_accumulation_steps 16, which is the same"):  # fmt: skip
        fit_passes(config(64), 128, memory, 10 * GB)
    with pytest.raises(ValueError, match=r"give --train_batch_size 8, which is the same global batch"):
        fit_passes(config(64, global_batch_size=128), 128, memory, 10 * GB)
    for train_batch_size in (64, "auto"):
        with pytest.raises(ValueError, match=r"one image needs about 1\.5 GB, and 1\.0 GB are free"):
            fit_passes(config(train_batch_size), 64, memory, 1 * GB)


def test_the_batch_of_a_huge_step_is_found_at_once():
    assert fit_passes(config("auto"), 3 * 2**60, Memory(0, 1 * GB), 20 * GB) == Passes(16, 3 * 2**56)


def test_weights_that_leave_no_memory_are_refused_before_they_exist(runtime, monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda device: 10 * GB)
    with torch.device("meta"):
        unet = UNet2DModel(block_out_channels=(32768, 32768), down_block_types=["DownBlock2D"] * 2,
                           up_block_types=["UpBlock2D"] * 2, layers_per_block=1)  # fmt: skip
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    needed = f"about {22 * parameters / 1e9:,.1f} GB for them, and 10.0 GB are free"  # 5.5 times float32
    with pytest.raises(ValueError, match=f"{parameters / 1e6:,.1f} M parameters: training needs {needed}"):
        plan.check_weights(unet, runtime)
    plan.check_weights(make_denoiser("tiny", height=4, width=4, in_channels=1), runtime)


class Huge(Squares):
    """Asks for an exabyte, which no allocator grants."""

    def forward(self, x_t, t, labels, return_dict):
        return (torch.empty(2**60, dtype=torch.uint8),)


def test_out_of_memory_in_the_measurement_is_a_step_that_does_not_fit(runtime, monkeypatch):
    memory = measure_memory(Huge(), (3, 8, 16), runtime)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 10 * GB)
    for train_batch_size in (64, "auto"):
        config = Config(dataset_name="moons", train_batch_size=train_batch_size)
        with pytest.raises(ValueError, match=r"one image needs more memory than there is, and 10\.0 GB are free"):
            plan.plan_passes(config, runtime, memory, {"batch_size": 64})


def test_other_errors_of_the_network_are_not_hidden(runtime):
    class Broken(Squares):
        def forward(self, x_t, t, labels, return_dict):
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        measure_memory(Broken(), (3, 8, 16), runtime)


def test_a_resumed_run_keeps_its_batches(runtime, monkeypatch):
    config, memory = Config(dataset_name="moons"), Memory(0, 1 * GB)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 40 * GB)
    assert plan.plan_passes(config, runtime, memory, None) == Passes(32, 2)
    assert plan.plan_passes(config, runtime, memory, {"batch_size": 16}) == Passes(16, 4)
    assert plan.plan_passes(config, runtime, memory, {"batch_size": 64}) == Passes(32, 2)  # now there is less memory
    assert plan.plan_passes(config, runtime, memory, {}) == Passes(32, 2)


@pytest.mark.parametrize(
    ("settings", "images_per_second", "expected"),
    [
        ({}, 1000, 64),  # an hour
        ({"max_train_minutes": 10}, 214, 64),
        ({"max_train_minutes": 10}, 213, 32),  # 127,800 images, 1,997 steps of 64
        ({"max_train_minutes": 10}, 27, 32),
        ({"max_train_minutes": 10}, 26, 16),  # 15,600 images, 487 steps of 32
        ({"max_train_minutes": 10}, 1, 16),
        ({"max_train_minutes": 1}, None, 64),  # without a trial
        ({"max_train_images": 128_000}, None, 64),
        ({"max_train_images": 127_000}, None, 32),
        ({"max_train_images": 16_000}, 10_000, 32),
        ({"max_train_images": 15_900}, 10_000, 16),
        ({"max_train_images": 128_000, "max_train_minutes": 1}, 10, 16),
        ({"max_train_steps": 100}, 10, 64),  # who counts steps wants so many
        ({"max_train_images": 1000, "gradient_accumulation_steps": 2}, None, 64),
    ],
)
def test_a_short_run_has_smaller_batches(settings, images_per_second, expected):
    config = Config(dataset_name="moons", **settings)
    budget = Budget.of(config, config.global_batch(1))
    assert plan.default_batch(config, budget, images_per_second, None) == expected


def test_a_resumed_run_has_the_batch_it_had():
    for accumulation, before in ((1, 64), (1, 16), (1, 66), (2, 128)):
        config = Config(dataset_name="moons", max_train_images=100, gradient_accumulation_steps=accumulation)
        default = plan.default_batch(config, Budget.of(config, 64), 1.0, {"global_batch": before})
        assert config.global_batch(1, default) == before
    assert config.global_batch(3, default) == 132  # which is refused, as before
    config = replace(config, gradient_accumulation_steps=32)  # so is this: 32 passes of at least one image
    assert config.global_batch(1, plan.default_batch(config, Budget(1), 1.0, {"global_batch": 16})) == 32


def test_memory_in_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "CGROUP", tmp_path)
    free = plan.available_bytes(torch.device("cpu"))
    assert free > 1e6
    for name, content in (
        ("memory.max", "5000000"),
        ("memory.current", "4000000"),
        ("memory.stat", "a 1\ninactive_file 7\n"),
    ):
        (tmp_path / name).write_text(content)
    assert plan.available_bytes(torch.device("cpu")) == 1_000_007
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.available_bytes(torch.device("cpu")) > 1e6


# ---- The network -----------------------------------------------------------------------------------------------------

RATES = {"tiny": 400.0, "small": 60.0, "base": 12.0, "large": 3.0}


@pytest.mark.parametrize(
    ("settings", "chosen", "tried"),
    [
        ({"max_train_minutes": 10}, "tiny", 2),
        ({"max_train_minutes": 60}, "small", 3),
        ({}, "small", 3),
        ({"max_train_minutes": 300}, "base", 4),
        ({"max_train_minutes": 3000}, "large", 4),
        ({"max_train_minutes": 0.1}, "tiny", 1),
        ({"max_train_steps": 100}, "tiny", 1),  # 6,400 images are too few for any other
        ({"max_train_steps": 4000, "max_train_minutes": 3000}, "large", 4),  # 256,000 images
        ({"max_train_steps": 10**6}, "small", 3),
    ],
)
def test_the_largest_family_that_sees_enough_images(runtime, monkeypatch, capsys, settings, chosen, tried):
    names = []

    def make(name):
        names.append(name)
        return make_denoiser("tiny", height=4, width=4, in_channels=1)

    monkeypatch.setattr(plan, "images_per_second", lambda *_: RATES[names[-1]])
    config = Config(dataset_name="moons", **settings)
    assert plan.choose_family(make, (1, 4, 4), runtime, config, Budget.of(config, 64)) == chosen
    assert names == list(FAMILIES)[:tried]
    reason = "the smallest (" if chosen == "tiny" else "the largest that sees "
    assert f"denoiser: {chosen}, {reason}" in capsys.readouterr().out


def test_a_family_that_does_not_fit_is_not_chosen(runtime, monkeypatch, capsys):
    memories = iter([Memory(0, 1), Memory(1e18, 1)])
    monkeypatch.setattr(plan, "measure_memory", lambda *_: next(memories))
    monkeypatch.setattr(plan, "images_per_second", lambda *_: 1e9)
    config = Config(dataset_name="moons")

    def make(name):
        return make_denoiser("tiny", height=4, width=4, in_channels=1)

    assert plan.choose_family(make, (1, 4, 4), runtime, config, Budget.of(config, 64)) == "tiny"
    assert "small needs more memory" in capsys.readouterr().out


def test_processes_on_a_cpu_share_its_memory(runtime, monkeypatch, capsys):
    """Of 40 GB each of four may take 10, of which a batch or a network gets 80 %."""
    monkeypatch.setattr(plan, "available_bytes", lambda device: 40 * GB)
    monkeypatch.setattr(plan, "images_per_second", lambda *_: 1e9)
    config = Config(dataset_name="moons")

    def make(name):
        return make_denoiser("tiny", height=4, width=4, in_channels=1)

    for processes, chosen, passes in ((1, "large", (32, 2)), (4, "tiny", (8, 8))):
        runtime.processes_per_node = processes
        assert plan.plan_passes(config, runtime, Memory(0, 1 * GB), None) == Passes(*passes)
        memories = iter([Memory(7 * GB, 1), *[Memory(9 * GB, 1)] * 3])
        monkeypatch.setattr(plan, "measure_memory", lambda *_, memories=memories: next(memories))
        assert plan.choose_family(make, (1, 4, 4), runtime, config, Budget.of(config, 64)) == chosen
    assert "small needs more memory" in capsys.readouterr().out


def test_a_length_that_will_not_do_is_said():
    """60,000 images; then ever fewer of them are seen, and last 40 of them 2,000 times."""
    config = Config(train_data_dir="images")
    assert plan.length_warnings(60_000, 60_000, 100.0, config) == []
    (rough,) = plan.length_warnings(30_000, 60_000, 100.0, config)
    assert "sees 30,000 images" in rough and "still rough: 200,000 take 33 minutes here" in rough
    (noise,) = plan.length_warnings(1000, 60_000, 100.0, config)
    assert "sees 1,000 images" in noise and "--max_train_minutes 2 at least" in noise
    for settings in ({"train_data_dir": "images", "init_from": "user/model"}, {"dataset_name": "moons"}):
        assert plan.length_warnings(1000, 60_000, 100.0, Config(**settings)) == []
    (by_heart,) = plan.length_warnings(80_000, 40, 100.0, config)
    assert "sees each image 2,000 times" in by_heart and "--dropout 0.1" in by_heart


def test_the_steps_that_a_run_will_have():
    """10 a second: limited in steps, in minutes, in both, and without a known speed."""
    for settings, steps in (
        ({"max_train_steps": 50}, 50),
        ({"max_train_minutes": 2}, 1200),
        ({"max_train_minutes": 2, "max_train_steps": 5000}, 1200),
        ({"max_train_minutes": 2, "max_train_steps": 50}, 50),
    ):
        assert plan.expected_steps(Budget.of(Config(dataset_name="moons", **settings), 64), 10.0) == steps
    assert plan.expected_steps(Budget.of(Config(dataset_name="moons", max_train_steps=50), 64), None) == 50


def test_without_a_trial_the_smallest_on_a_cpu(runtime):
    config = Config(dataset_name="moons", tune="off")
    assert plan.choose_family(None, (1, 4, 4), runtime, config, Budget.of(config, 64)) == "tiny"


def test_the_speed_of_a_family_is_measured(runtime):
    unet = make_denoiser("tiny", height=8, width=8, in_channels=1)
    assert 1 < plan.images_per_second(unet, (1, 8, 8), runtime) < 1e6
