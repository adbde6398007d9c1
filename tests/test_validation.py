"""The loss and the bound of held-out pictures: against a slow loop, and in whole runs, which they must not change."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, fidelity, likelihood, rng
from ddpm_pipeline.features import make_extractor
from tests.short_run import SHORT_RUN, run_here
from training.data.split import load_data_split
from training.run import checkpoint, validation
from training.run.validation import EDGES, STEPS_OF_EACH, STRATA, Validation, bands, kernel_distance

TRAIN = Path(__file__).parents[1] / "training" / "train.py"
SHAPE = (2, 3, 5)
CPU = torch.device("cpu")


def walk(num_steps=1000, **options):
    return DDPMScheduler(num_train_timesteps=num_steps, **options)


def pictures(number, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (number, *SHAPE), dtype=dtype)


def as_network_sees(pixels):
    """In [-1, 1], float64."""
    return torch.from_numpy(pixels.astype(np.float64)) * 2 / np.iinfo(pixels.dtype).max - 1


def network(x_t, t):
    """Says something of each picture alone."""
    return torch.tanh(2 * x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


class Recorder:
    """A network that remembers what it was asked."""

    def __init__(self, answer=network):
        self.answer, self.asked = answer, []

    def __call__(self, x_t, t):
        self.asked.append((x_t, t))
        return self.answer(x_t, t)

    def lessons(self):
        """(pictures, STEPS_OF_EACH): t of the questions for the loss, which come first if all is one batch."""
        return torch.stack([t for _, t in self.asked[:STEPS_OF_EACH]], dim=1)


def validate(pixels, scheduler, answer=network, *, number=None, batch_size=64, share=(0, 1), **options):
    number = len(pixels) if number is None else number
    held_out = Validation(pixels, number, scheduler, device=CPU, batch_size=batch_size, share=share)
    return held_out.measure(answer, **options)


def steps_of(pixels, scheduler):
    recorder = Recorder()
    validate(pixels, scheduler, recorder)
    return recorder.lessons()


def slow_losses(pixels, scheduler, t):
    """Mean squared error of each picture at its t, in a plain loop and float64: (N, STEPS_OF_EACH)."""
    losses = torch.zeros(t.shape, dtype=torch.float64)
    for i, x_0 in enumerate(as_network_sees(pixels)):
        for k in range(STEPS_OF_EACH):
            key = rng.key(validation.SEED, rng.Stream.VALIDATION_NOISE, k)
            eps = rng.normal(key, torch.tensor([i]), SHAPE)[0].double()
            alpha_bar = scheduler.alphas_cumprod[t[i, k]]
            signal, noise_std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            x_t = signal * x_0 + noise_std * eps
            target = {"epsilon": eps, "sample": x_0, "v_prediction": signal * eps - noise_std * x_0}
            said = network(x_t[None], t[i, k : k + 1])[0]
            losses[i, k] = (said - target[scheduler.prediction_type]).square().mean()
    return losses


# ---- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_that_of_a_plain_loop(prediction_type, dtype):
    scheduler, pixels = walk(prediction_type=prediction_type), pictures(16, dtype)
    t = steps_of(pixels, scheduler)
    losses = slow_losses(pixels, scheduler, t)
    found = validate(pixels, scheduler)
    assert found["validation_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    log_snr = scheduler.alphas_cumprod[t].logit()
    for name, low, high in zip(bands(), (-math.inf, *EDGES), (*EDGES, math.inf)):
        chosen = losses[(low < log_snr) & (log_snr <= high)]
        assert len(chosen) > 1
        assert found[f"validation_loss/{name}"] == pytest.approx(chosen.mean().item(), rel=1e-5)


def test_a_network_that_is_right_has_no_loss_and_one_that_says_nothing_the_mean_square_of_the_target():
    scheduler, pixels = walk(prediction_type="sample"), pictures(8)
    x_0 = as_network_sees(pixels)
    found = validate(pixels, scheduler, lambda x_t, t: x_0.float())
    assert found["validation_loss"] < 1e-13
    found = validate(pixels, scheduler, lambda x_t, t: torch.zeros_like(x_t))
    assert found["validation_loss"] == pytest.approx(x_0.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("number", "num_steps"), [(5, 1000), (25, 100), (25, 50), (3, 7), (2, 1)])
def test_t_is_evenly_spread_over_the_walk(number, num_steps):
    """Of N pictures with 4 each, in every part of T / 4 N steps there is one."""
    pairs = number * STEPS_OF_EACH
    t = steps_of(pictures(number), walk(num_steps)).flatten().sort().values
    if num_steps >= pairs:
        assert (t * pairs // num_steps).tolist() == list(range(pairs))
    assert t.tolist() == [int((k + 0.5) * num_steps / pairs) for k in range(pairs)]


def test_the_places_of_a_picture_are_not_those_of_its_number():
    """No picture has only early or only late steps, as it would if t were dealt out in order."""
    t = steps_of(pictures(64), walk()).double()
    assert ((t.mean(1) - 500).abs() < 480).all() and t.mean(1).std() > 50
    assert abs(np.corrcoef(t[:, 0], np.arange(64))[0, 1]) < 0.4  # 3 standard errors of 64 independent ones


@pytest.mark.parametrize("edge", range(5))
def test_errors_at_a_level_of_noise_go_into_its_band(edge):
    assert bands() == [
        "log_snr_below_-4", "log_snr_-4_to_-1", "log_snr_-1_to_1", "log_snr_1_to_4", "log_snr_above_4",
    ]  # fmt: skip
    scheduler, pixels = walk(prediction_type="sample"), pictures(16)
    low, high = (-math.inf, *EDGES)[edge], (*EDGES, math.inf)[edge]
    x_0 = as_network_sees(pixels).float()

    def wrong_in_one_band(x_t, t):
        log_snr = scheduler.alphas_cumprod[t].logit()
        return x_0 + ((low < log_snr) & (log_snr < high)).float().view(-1, 1, 1, 1)

    found = validate(pixels, scheduler, wrong_in_one_band)
    losses = [found[f"validation_loss/{name}"] for name in bands()]
    assert losses == pytest.approx([float(i == edge) for i in range(5)], abs=1e-6)
    t = steps_of(pixels, scheduler)
    log_snr = scheduler.alphas_cumprod[t].logit()
    share = ((low < log_snr) & (log_snr < high)).double().mean().item()
    assert found["validation_loss"] == pytest.approx(share, abs=1e-6) and share > 0


def test_a_band_without_a_step_is_not_named():
    found = validate(pictures(4), walk(10, beta_end=1e-3))
    assert [name for name in found if "/" in name] == ["validation_loss/log_snr_above_4"]
    assert found["validation_loss"] == found["validation_loss/log_snr_above_4"]


# ---- The bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "levels"), [(np.uint8, 256), (np.uint16, 65536)])
@pytest.mark.parametrize("num_steps", [1000, 4, 1])
def test_the_bits_are_those_of_the_bound(dtype, levels, num_steps):
    scheduler, pixels = walk(num_steps), pictures(7, dtype)
    strata = min(STRATA, max(1, num_steps - 1))
    bound = likelihood.variational_bound(
        network, scheduler, as_network_sees(pixels).float(), strata=strata, levels=levels
    )
    each = bound.total / (math.prod(SHAPE) * math.log(2))
    found = validate(pixels, scheduler, batch_size=3)
    assert found["bits_per_dim"] == pytest.approx(each.mean().item(), rel=1e-5)
    error = np.std(each.numpy(), ddof=1) / math.sqrt(7)
    assert found["bits_per_dim_standard_error"] == pytest.approx(error, rel=1e-5)


# ---- Which pictures, in which batches and processes ------------------------------------------------------------------


def test_pictures_are_taken_evenly():
    pixels = pictures(10)
    some = Validation(pixels, 4, walk(), device=CPU)
    assert some.number == 4 and np.array_equal(some.pixels, pixels[[0, 2, 5, 7]])
    assert some.measure(network) == validate(pixels[[0, 2, 5, 7]], walk())
    every = Validation(pixels, 99, walk(), device=CPU)
    assert every.number == 10 and np.array_equal(every.pixels, pixels)
    assert Validation(pixels[:0], 99, walk(), device=CPU).number == 0


def test_of_one_picture_there_is_no_standard_error():
    found = validate(pictures(1), walk())
    assert math.isfinite(found["bits_per_dim"]) and "bits_per_dim_standard_error" not in found


def test_the_same_numbers_each_time_whatever_the_batch_and_torchs_random_state():
    pixels, scheduler = pictures(9), walk()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = validate(pixels, scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert validate(pixels, scheduler) == whole
    for batch_size in (1, 4):
        assert validate(pixels, scheduler, batch_size=batch_size) == pytest.approx(whole, rel=1e-6)
    assert validate(pictures(9, seed=1), scheduler)["validation_loss"] != whole["validation_loss"]


@pytest.mark.parametrize(("number", "processes"), [(9, 2), (9, 4), (2, 3)])
def test_the_values_of_several_processes_are_those_of_one(number, processes):
    """Each process gives its values and gets those of all; one may have no image."""
    pixels, scheduler = pictures(number), walk()
    calls = []  # of each process: its losses, then its bits

    def collect(values):
        calls.append(values)
        return whole[(len(calls) - 1) % 2]

    whole = []
    validate(pixels, scheduler, gather=lambda values: whole.append(values) or values)
    for process in range(processes):
        validate(pixels, scheduler, share=(process, processes), gather=collect)
    gathered = [[part for values in calls[kind::2] for part in values] for kind in (0, 1)]
    for process in range(processes):
        answers = list(gathered)
        found = validate(
            pixels, scheduler, share=(process, processes), gather=lambda _, answers=answers: answers.pop(0)
        )
        assert found == pytest.approx(validate(pixels, scheduler), rel=1e-5)


def test_the_standard_error_keeps_its_digits_beside_a_large_mean():
    """1e6 bits with a standard deviation of 1: in float32 sums of squares nothing of it would be left."""
    pixels, scheduler = pictures(9), walk()
    values = [1e6 + i for i in range(9)]
    answers = iter([[(list(range(9)), [[1.0] * STEPS_OF_EACH] * 9)], [(list(range(9)), values)]])
    found = validate(pixels, scheduler, gather=lambda _: next(answers))
    assert found["bits_per_dim"] == pytest.approx(np.mean(values), rel=1e-15)
    assert found["bits_per_dim_standard_error"] == pytest.approx(np.std(values, ddof=1) / 3, rel=1e-12)


# ---- The kernel distance ---------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_that_of_the_features(tmp_path):
    extractor, held_out = make_extractor("pixels", images=pictures(1)), pictures(12, seed=2)
    samples = as_network_sees(pictures(8)) * 1.5  # some beyond black and white
    found = kernel_distance(samples, held_out, extractor, tmp_path)
    clipped = ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    truth = fidelity.kernel_distance(extractor(clipped), extractor(torch.from_numpy(held_out)))
    assert found == {
        "kernel_distance": pytest.approx(truth.value), "kernel_distance_standard_error": pytest.approx(truth[1])
    }  # fmt: skip


@pytest.mark.parametrize(("number", "held_out"), [(8, pictures(1)), (1, pictures(8))])
def test_where_there_is_no_distance_there_is_a_warning(tmp_path, capsys, number, held_out):
    extractor = make_extractor("pixels", images=held_out)
    alike = as_network_sees(pictures(number)).expand(8, -1, -1, -1)
    assert kernel_distance(alike, held_out, extractor, tmp_path) == {}
    assert "WARNING: no kernel distance" in capsys.readouterr().err


# ---- Whole runs ------------------------------------------------------------------------------------------------------

OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "max_train_steps": 5,
    "validation_steps": 2,
    "num_validation_images": 8,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 3,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 1,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("validation")


def train(work, name, **options):
    """Run train.py here, of the moons unless told: its exit code."""
    options = {"output_dir": work / name, "cache_dir": work / "cache", **OPTIONS, **options}
    if "train_data_dir" not in options:
        options |= {"dataset_name": "moons", "resolution": 16}
    return run_here("train.py", [f"--{option}={value}" for option, value in options.items()])


def lines(folder):
    """Lines of metrics.jsonl of the held-out pictures."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "validation_loss" in line]


def save_pictures(folder, number):
    folder.mkdir()
    for i in range(number):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)).save(
            folder / f"{i:03}.png"
        )
    return folder


@pytest.fixture(scope="module")
def whole(work):
    assert train(work, "whole", validation_samples=16, extractor="pixels") == 0
    return work / "whole"


def test_a_run_logs_the_held_out_pictures_now_and_then_and_at_its_end(whole):
    logged = lines(whole)
    assert [(line["step"], line["images"]) for line in logged] == [(2, 8), (4, 16), (5, 20)]
    for line in logged:
        assert {"validation_loss", "bits_per_dim", "bits_per_dim_standard_error"} < line.keys()
        assert {"kernel_distance", "kernel_distance_standard_error"} < line.keys()
        assert {name.partition("/")[2] for name in line if "/" in name} <= set(bands())
        assert all(math.isfinite(value) for value in line.values())
    assert logged[0]["validation_loss"] > logged[2]["validation_loss"] > 0


def test_what_it_logs_is_of_the_averaged_weights_and_the_test_split(whole, work):
    parts = load_data_split(dataset_name="moons", resolution=16, cache_dir=work / "cache")
    assert len(parts.train_indices) == 8192 and len(parts.held_out) == 1024
    pipe = DDPMPipeline.from_pretrained(whole / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def measured():
        held_out = Validation(parts.held_out, 8, pipe.scheduler, device=CPU, batch_size=4)
        found = held_out.measure(lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0])
        samples = pipe(seeds=list(range(1_000_000, 1_000_016)), num_inference_steps=3, output_type="latent").images
        extractor = make_extractor("pixels", images=parts.training)
        return found | kernel_distance(samples, parts.held_out, extractor, work / "cache" / "features")

    last = {name: value for name, value in lines(whole)[-1].items() if name not in ("step", "images")}
    assert measured() == pytest.approx(last, rel=1e-4)
    pipe.unet.load_state_dict(load_file(whole / "checkpoint-000005" / "model.safetensors"))
    assert abs(measured()["validation_loss"] / last["validation_loss"] - 1) > 1e-3


def test_it_changes_nothing_of_the_training(whole, work):
    assert train(work, "without", validation_steps=0) == 0
    assert lines(work / "without") == []
    with_it, without = (
        checkpoint.verified(work / name / "checkpoint-000005")["files"] for name in ("whole", "without")
    )
    assert with_it == without


def test_a_resumed_run_logs_the_same(whole, work):
    save = checkpoint.save

    def save_and_die(*args, **options):
        save(*args, **options)
        raise KeyboardInterrupt

    options = {"validation_samples": 16, "extractor": "pixels"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(work, "resumed", **options)
    assert [line["step"] for line in lines(work / "resumed")] == [2]
    assert train(work, "resumed", resume_from_checkpoint="latest", **options) == 0
    assert lines(work / "resumed") == lines(whole)


def test_of_a_folder_every_20th_picture_is_held_out(work, capsys):
    folder = save_pictures(work / "45", 45)
    assert train(work, "of 45", train_data_dir=folder, max_train_steps=2) == 0
    manifest = checkpoint.verified(work / "of 45" / "checkpoint-000002")
    assert manifest["num_images"] == 43
    assert "every 20th picture of 45 images of folder 45" in manifest["held_out"]
    said = capsys.readouterr().out
    assert "43 images, 1 x 16 x 16" in said and "held out: 2 images, every 20th picture of 45 images" in said
    assert [line["step"] for line in lines(work / "of 45")] == [2]
    options = {"validation_split": "none", "max_train_steps": 2}
    assert train(work, "of all 45", train_data_dir=folder, **options) == 0
    assert checkpoint.verified(work / "of all 45" / "checkpoint-000002")["num_images"] == 45
    assert lines(work / "of all 45") == [] and "held out" not in capsys.readouterr().out


def test_a_single_picture_held_out_does_not_end_the_run(work, capsys):
    folder = save_pictures(work / "25", 25)
    options = {"max_train_steps": 2, "validation_samples": 4, "extractor": "pixels"}
    assert train(work, "of 25", train_data_dir=folder, **options) == 0
    (line,) = lines(work / "of 25")
    assert line["validation_loss"] > 0 and "kernel_distance" not in line
    assert "WARNING: no kernel distance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_validation_images": 1}, "num_validation_images is 1"),
        ({"validation_steps": -1}, "validation_steps is -1"),
        ({"validation_samples": 1}, "validation_samples is 1"),
        ({"validation_samples": -2}, "validation_samples is -2"),
        ({"validation_samples": 16, "validation_steps": 0}, "validation_steps is 0"),
        ({"validation_split": "valid"}, "validation_split is 'valid'"),
        ({"validation_split": "train"}, "validation_split is 'train'"),
        ({"validation_samples": 16, "extractor": "eyes"}, "extractor is 'eyes'"),
    ],
)
def test_settings_that_cannot_be(work, capsys, options, words):
    assert train(work, "mistake", **options) == 2
    assert words in capsys.readouterr().err
    assert not list((work / "mistake").glob("checkpoint-*"))
