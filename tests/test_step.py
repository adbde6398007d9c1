"""The optimizer step against clip_grad_norm_ and AdamW, skipped steps, and that no step makes the host wait; the last
two with Muon too."""

import contextlib
import copy
import math
import types
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipeline.transfer import HostCopy, to_device
from tests.arrays import save_images
from tests.no_float64 import DEVICE, OnDevice, PretendDevice
from tests.short_run import NETWORK, SHORT_RUN, flags, run_here
from training import step as step_module
from training.config import Config
from training.denoiser import PRESETS
from training.ema import FlatEMA
from training.step import Updater, make_optimizer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
CONFIG = Config(dataset_name="moons", learning_rate=0.01, adam_weight_decay=0.1, max_grad_norm=1.0)
CONFIGS = {"adamw": CONFIG, "muon": replace(CONFIG, optimizer="muon")}


def runtime(scaler=None):
    """What `Updater` uses of a Runtime of one process."""
    return types.SimpleNamespace(accelerator=types.SimpleNamespace(scaler=scaler), world_size=1)


def network(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 5, 3), torch.nn.Flatten(), torch.nn.Linear(180, 7)).to(device)


def set_gradients(model, seed, scale=1.0, unused=None):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = None if name == unused else gradient.to(parameter.device)


def state_of(model, optimizer):
    """Copies of the weights, and of moments and step counters."""
    moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]


def assert_equal(a, b):
    assert len(a) == len(b) > 0
    assert all(map(torch.equal, a, b))


def scalar(value, device):
    return torch.tensor(value, device=device)


# ---- The update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
def test_an_update_is_clip_grad_norm_and_adamw(device, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(step_module, "FUSED", ())
    model, plain = network(device), network(device)
    optimizer = make_optimizer(CONFIG, model)
    assert optimizer.defaults["fused"] == fused
    updater = Updater(optimizer, 1.0, runtime())
    reference = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    assert reference.defaults["betas"] == optimizer.defaults["betas"]
    assert reference.defaults["eps"] == optimizer.defaults["eps"]
    for step in range(1, 9):
        scale = (1e-4, 1.0, 50.0)[step % 3]  # norms of 0.004, far below the largest, to 2,000
        for m in (model, plain):
            set_gradients(m, step, scale, unused="0.bias" if step == 4 else None)
        for group in reference.param_groups:
            group["lr"] = 0.01 * step
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        pending = updater.step(step, 0.01 * step, scalar(0.5, device), [], False)
        assert pending.norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert pending.outcome() == (False, False, False)
        assert all(parameter.grad is None for parameter in model.parameters())
        for ours, theirs in zip(state_of(model, optimizer), state_of(plain, reference), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("loss", "entry"), [(math.nan, 0.0), (math.inf, 0.0), (0.5, math.nan), (0.5, -math.inf)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_nonfinite_step_changes_nothing(device, fused, loss, entry, first, config, monkeypatch):
    if not fused:
        monkeypatch.setattr(step_module, "FUSED", ())
    model = network(device)
    ema, optimizer = FlatEMA(model), make_optimizer(config, model)
    updater = Updater(optimizer, 1.0, runtime())
    taken = [] if first else [1, 2]
    for step in taken:
        set_gradients(model, step)
        ema.update(step, updater.step(step, 0.01, scalar(0.5, device), [], False).skip)
    other = copy.deepcopy(model)
    other_optimizer = make_optimizer(config, other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, ema_before = state_of(model, optimizer), ema.state_dict()

    set_gradients(model, 3)
    model[0].weight.grad[0, 0, 0, 0] += entry
    pending = updater.step(3, 0.01, scalar(loss, device), [], False)
    ema.update(3, pending.skip)
    assert pending.outcome() == (True, True, False)
    assert_equal(state_of(model, optimizer)[: len(before)], before)
    assert_equal(list(ema.state_dict().values()), list(ema_before.values()))

    set_gradients(model, 4)  # as if the step had not been
    set_gradients(other, 4)
    pending = updater.step(4, 0.01, scalar(0.5, device), [], False)
    Updater(other_optimizer, 1.0, runtime()).step(4, 0.01, scalar(0.5, device), [], False)
    ema.update(4, pending.skip)
    assert_equal(state_of(model, optimizer), state_of(other, other_optimizer))
    assert not torch.equal(ema.state_dict()["0.weight"], ema_before["0.weight"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_with_fp16_an_overflow_is_skipped_and_a_non_finite_loss_is_a_fault(device, config):
    """And the loss scaler halves its scale, or doubles it after two good steps, while the host does not wait."""
    model, plain = network(device), network(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
    scaler.scale(scalar(1.0, device))  # makes its tensors, as the first backward pass does
    optimizer, reference = make_optimizer(config, model), make_optimizer(config, plain)
    updater, recorder = Updater(optimizer, 1.0, runtime(scaler)), Recorder()

    def outcome(step, loss=0.5, entry=0.0):
        set_gradients(model, step, scaler.get_scale())
        model[0].weight.grad[0, 0, 0, 0] += entry
        recorder.step = 2
        with Operations(recorder):
            pending = updater.step(step, 0.01, scalar(loss, device), [], False)
        assert recorder.waits == []
        return pending.outcome()[:2]

    assert outcome(1) == (False, False)
    set_gradients(plain, 1)
    Updater(reference, 1.0, runtime()).step(1, 0.01, scalar(0.5, device), [], False)
    for ours, theirs in zip(state_of(model, optimizer), state_of(plain, reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    before = state_of(model, optimizer)
    assert outcome(2, entry=math.inf) == (False, True) and scaler.get_scale() == 512.0
    assert outcome(3, loss=math.nan) == (True, True)
    assert_equal(state_of(model, optimizer), before)
    assert outcome(4) == (False, False) and scaler.get_scale() == 1024.0
    assert not torch.equal(state_of(model, optimizer)[0], before[0])


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_of_this_rank_is_in_the_outcome(asked):
    model = network("cpu")
    set_gradients(model, 1)
    updater = Updater(make_optimizer(CONFIG, model), 1.0, runtime())
    assert updater.step(1, 0.01, torch.tensor(0.5), [], asked).outcome() == (False, False, asked)


# ---- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_copies_have_the_values(device):
    x = torch.arange(5.0)
    on_device = to_device(x, torch.device(device))
    assert on_device.device.type == device
    copied = HostCopy(on_device * 2)
    on_device.zero_()
    assert copied.read() == [0.0, 2.0, 4.0, 6.0, 8.0] == copied.read()


# ---- No step waits ---------------------------------------------------------------------------------------------------

STEPS = 8
RUN = {
    **SHORT_RUN, "max_train_steps": STEPS, "train_batch_size": 3, "gradient_accumulation_steps": 2,
    "logging_steps": 100, "checkpointing_steps": 100, "save_images_steps": 0, "validation_steps": 0,
    "ddpm_num_inference_steps": 2, "num_sample_images": 1,
}  # fmt: skip
WAITING_OPERATIONS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
WAITING_FUNCTIONS = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "__array__", "nonzero",
    "masked_select", "is_nonzero", "equal", "allclose", "cpu",
}  # fmt: skip


class Recorder:
    """What makes the host wait in each step. A step lasts from its EMA update to that of the next one."""

    def __init__(self):
        self.step, self.paused = 0, False
        self.waits, self.reads = [], []

    def add(self, what):
        if not self.paused and 2 <= self.step < STEPS - 1:  # the first and the last step are logged
            self.waits.append((self.step, what))

    @contextlib.contextmanager
    def pause(self):
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def watch(self, patch):
        """Follow the steps of a run. The host may read the outcome of a step: `check` asks when it does."""
        update, read, step = FlatEMA.update, HostCopy.read, Updater.step

        def recorded_update(ema, number, *arguments):
            update(ema, number, *arguments)
            self.step = number

        def recorded_step(updater, number, *arguments):
            pending = step(updater, number, *arguments)
            pending.flags.number = number
            return pending

        def recorded_read(copied):
            self.reads.append((copied.number, self.step))
            with self.pause():
                return read(copied)

        patch.setattr(FlatEMA, "update", recorded_update)
        patch.setattr(HostCopy, "read", recorded_read)
        patch.setattr(Updater, "step", recorded_step)

    def check(self):
        assert self.step == STEPS
        assert self.waits == []
        # Each outcome is read in the next step, but after the first step and the last one at once.
        late = [(number, number + 1) for number in range(2, STEPS)]
        assert self.reads == [(1, 1), *late, (STEPS, STEPS)]


class Operations(TorchDispatchMode):
    """Records operations whose result the host needs, and copies to another device that it waits for."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if name in WAITING_OPERATIONS:
            self.recorder.add(name)
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking") and True not in args[2:]:
            devices = {tensor.device for tensor in (*args[:2], result) if isinstance(tensor, torch.Tensor)}
            if len(devices) > 1:
                self.recorder.add(name)
        return result


class Functions(TorchFunctionMode):
    """The same on the pretend device, whose tensors are on the CPU for PyTorch."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        here = bool(args) and isinstance(args[0], OnDevice)
        moved = isinstance(args[0] if args else None, torch.Tensor) and here != isinstance(result, OnDevice)
        if name == "copy_":
            moved = here != isinstance(args[1], OnDevice)
        waits = here and name in WAITING_FUNCTIONS
        waits |= name in ("to", "copy_") and moved and (here or not kwargs.get("non_blocking"))
        waits |= name in ("tensor", "as_tensor") and isinstance(result, OnDevice)  # copies from the host
        if waits:
            self.recorder.add(name)
        return result


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains with these options, and records."""
    data = save_images(tmp_path / "images", 10, 8, 8)
    paths = {"train_data_dir": data, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "run"}
    recorder = Recorder()
    recorder.watch(monkeypatch)

    def train(cpu=True, **options):
        assert run_here("train.py", flags(RUN | paths | options), cpu) == 0
        return recorder

    train.recorder = recorder
    return train


@pytest.mark.parametrize(("precision", "optimizer"), [("no", "adamw"), ("bf16", "adamw"), ("no", "muon")])
def test_no_step_waits_on_the_cpu(run, precision, optimizer):
    with Operations(run.recorder):
        run(mixed_precision=precision, optimizer=optimizer).check()


@pytest.mark.filterwarnings("ignore")
def test_no_step_waits_on_the_pretend_device(run, monkeypatch):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    monkeypatch.setattr(Accelerator, "device", property(lambda self: DEVICE))
    monkeypatch.setattr(step_module, "FUSED", ("mps",))
    monkeypatch.setitem(PRESETS, "tiny", NETWORK)  # a file of a network is tried on another device
    adamw_step = torch.optim.AdamW.step

    def unrecorded(*arguments):  # it sorts tensors by their device, which for PyTorch is the CPU
        with run.recorder.pause():
            return adamw_step(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", unrecorded)
    try:
        with PretendDevice(), Functions(run.recorder):
            run(denoiser="tiny").check()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@needs_cuda
@pytest.mark.parametrize("optimizer", CONFIGS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_no_step_waits_on_cuda(run, monkeypatch, precision, optimizer):
    update = FlatEMA.update

    def strict(ema, number, *arguments):
        torch.cuda.set_sync_debug_mode("error" if 2 <= number < STEPS - 1 else "default")
        update(ema, number, *arguments)

    monkeypatch.setattr(FlatEMA, "update", strict)
    try:
        run(mixed_precision=precision, optimizer=optimizer, cpu=False).check()
    finally:
        torch.cuda.set_sync_debug_mode("default")
