"""training/evaluate.py on a run of six steps: its values against the same measures computed here, and its samples.

Most evaluations run in this process, which has imported everything; the first, the killed and the distributed one run
in child processes.
"""

import hashlib
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, fidelity, likelihood
from ddpm_pipeline.features import extract_features, make_extractor
from tests.evaluation.helpers import (
    NUM_BOUND_IMAGES,
    NUM_REFERENCE,
    NUM_SAMPLES,
    STRATA,
    arguments,
    evaluate_here,
    find_measurement,
    saved_samples,
    shard_files,
    train,
)
from tests.models import tiny_unet
from tests.short_run import run_in_child
from training import evaluate as script
from training.evaluation import evaluator


def max_difference(a, b):
    """In levels of brightness."""
    return np.abs(a.astype(int) - b.astype(int)).max()


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "steps", "eta"), [("EMA", 4, 1), ("EMA", 8, 0), ("online", 4, 1)], ids=["primary", "other", "online"]
)
def test_distances_are_those_of_the_saved_samples(first_report, run, train_images, test_images, weights, steps, eta):
    """The reference set is every 40.96th training image, the baseline every 12.8th held-out image."""
    samples = saved_samples(run, weights=weights.lower(), steps=steps, eta=eta)[:NUM_SAMPLES]
    reference = train_images[[i * 8192 // NUM_REFERENCE for i in range(NUM_REFERENCE)]]
    equal = reference[[i * NUM_REFERENCE // NUM_SAMPLES for i in range(NUM_SAMPLES)]]
    baseline = test_images[[i * 1024 // NUM_SAMPLES for i in range(NUM_SAMPLES)]]
    extractor = make_extractor("pixels", images=train_images[:2])
    f_samples, f_reference, f_equal, f_baseline, f_test = (
        extract_features(extractor, pixels) for pixels in (samples, reference, equal, baseline, test_images)
    )
    truth = {
        "frechet_distance": [fidelity.frechet_distance(x, f_reference) for x in (f_samples, f_baseline)],
        "kernel_distance": [fidelity.kernel_distance(x, f_reference).value for x in (f_samples, f_baseline)],
        "precision": [fidelity.precision_recall(x, f_equal)[0] for x in (f_samples, f_baseline)],
        "recall": [fidelity.precision_recall(x, f_equal)[1] for x in (f_samples, f_baseline)],
        "density": [fidelity.density_coverage(x, f_equal)[0] for x in (f_samples, f_baseline)],
        "coverage": [fidelity.density_coverage(x, f_equal)[1] for x in (f_samples, f_baseline)],
        "memorisation": [fidelity.memorisation(f_samples, f_reference, f_test).value, 0.5],
        "mean_shift": [fidelity.channel_shift(x, reference)[0].mean.value for x in (samples, baseline)],
        "std_ratio": [fidelity.channel_shift(x, reference)[0].std_ratio.value for x in (samples, baseline)],
    }
    wanted = {"weights": weights, "num_inference_steps": steps, "eta": eta}
    for measure, (value, real_value) in truth.items():
        m = find_measurement(first_report, measure, **wanted)
        assert m["value"] == pytest.approx(value, rel=1e-6), measure
        assert m["real_data_baseline"] == pytest.approx(real_value, rel=1e-6), measure
    for measure, error in {
        "frechet_distance": fidelity.jackknife(fidelity.frechet_distance, f_samples, f_reference).standard_error,
        "kernel_distance": fidelity.kernel_distance(f_samples, f_reference).standard_error,
        "recall": fidelity.jackknife(
            lambda x, y: fidelity.precision_recall(x, y)[1], f_samples, f_equal
        ).standard_error,
        "mean_shift": fidelity.channel_shift(samples, reference)[0].mean.standard_error,
    }.items():
        m = find_measurement(first_report, measure, **wanted)
        assert m["standard_error"] == pytest.approx(error, rel=1e-6), measure
    assert truth["precision"][1] > 0.8 and truth["coverage"][1] > 0.8  # real images are like real images
    assert first_report["reference"]["sha256"] == hashlib.sha256(reference.tobytes()).hexdigest()


def test_bits_are_those_of_the_variational_bound(first_report, run, test_images):
    """For EMA and online weights, with both fixed variances."""
    index = [i * 1024 // NUM_BOUND_IMAGES for i in range(NUM_BOUND_IMAGES)]
    x_0 = torch.from_numpy(test_images[index] / 127.5 - 1).float()
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    for weights in ("EMA", "online"):
        if weights == "online":
            pipe.unet.load_state_dict(load_file(run / "checkpoint-000006" / "model.safetensors"))
        for variance_type in ("fixed_small", "fixed_large"):
            scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
            bound = likelihood.variational_bound(
                lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0], scheduler, x_0, strata=STRATA
            )  # fmt: skip
            bits = likelihood.bits_per_dim(bound.total, x_0.shape[1:])
            name = f"bits per dimension, variational bound, {variance_type}, {STRATA} timesteps per image"
            m = find_measurement(first_report, "bits_per_dim", weights=weights, name=name)
            assert m["value"] == pytest.approx(bits.mean().item(), rel=1e-5)
            assert m["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(NUM_BOUND_IMAGES), rel=1e-4)
            key = (weights, variance_type)
            (curve,) = [c for c in first_report["curves"] if (c["weights"], c["variance_type"]) == key]
            assert curve["stratum_size"] == bound.stratum_size.tolist() and sum(curve["stratum_size"]) == 19
            kl = sum(n * bits for n, bits in zip(curve["stratum_size"], curve["kl"]))
            assert curve["prior"] + kl + curve["decoder"] == pytest.approx(m["value"], rel=1e-4)
            progressive = likelihood.rate_distortion(bound, x_0.shape[1:])
            assert curve["rate_distortion"]["distortion"] == pytest.approx(progressive.distortion.tolist(), rel=1e-4)


def test_the_bound_alone_draws_no_samples_and_can_take_all_timesteps(run, work, test_images):
    """Settings of samples are not used: 50 steps, more than this model has; more samples than there are images."""
    unused = {"num_inference_steps": (50,), "num_samples": 2048, "num_reference": 0}
    report = evaluate_here(work, run, "bound", metrics=("bound",), weights=("ema",), strata=0, **unused)
    assert not (work / "bound" / "evaluation" / "samples").exists()
    names = [m["name"] for m in report["measurements"]]
    assert names == [
        f"bits per dimension, variational bound, {kind}, all timesteps" for kind in ("fixed_small", "fixed_large")
    ]
    assert report["warnings"] == [] and [curve["stratum_size"] for curve in report["curves"]] == [[1] * 19] * 2
    assert re.findall(r"\((\S+png)\)", (work / "bound" / "report.md").read_text()) == [
        "evaluation/bound.png", "evaluation/rate_distortion.png",
    ]  # fmt: skip
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    index = [i * 1024 // NUM_BOUND_IMAGES for i in range(NUM_BOUND_IMAGES)]
    x_0 = torch.from_numpy(test_images[index] / 127.5 - 1).float()
    bound = likelihood.variational_bound(lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0], pipe.scheduler, x_0)
    bits = likelihood.bits_per_dim(bound.total, x_0.shape[1:]).mean().item()
    assert find_measurement(report, "bits_per_dim", name=names[0])["value"] == pytest.approx(bits, rel=1e-5)


def test_probability_flow_ode_likelihood(run, work, test_images):
    report = evaluate_here(work, run, "flow", metrics=("flow",), weights=("ema",), num_flow_images=2)
    (m,) = report["measurements"]
    assert (m["measure"], m["n"], report["curves"]) == ("bits_per_dim_ode", 2, [])
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    pixels = torch.from_numpy(test_images[[0, 512]])
    nats = likelihood.probability_flow_nats(
        lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0], pipe.scheduler, likelihood.dequantise(pixels),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    bits = likelihood.bits_per_dim(likelihood.discrete_nats(nats, (1, 16, 16), 256), (1, 16, 16))
    assert m["value"] == pytest.approx(bits.mean().item(), rel=1e-4)


# ---- Samples are reused ----------------------------------------------------------------------------------------------


def test_a_second_evaluation_draws_no_samples(first_report, run, work, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a sample is drawn")

    monkeypatch.setattr(DDPMPipeline, "__call__", fail)
    times = {file: file.stat().st_mtime_ns for file in (run / "evaluation" / "samples").rglob("*")}
    assert len([file for file in times if file.suffix == ".npy"]) == 5 * 2
    first_bytes = (run / "report.json").read_bytes()
    report = evaluate_here(work, run, num_inference_steps=(4, 8), eta=(1.0, 0.0))
    (run / "report.json").write_bytes(first_bytes)
    assert {file: file.stat().st_mtime_ns for file in (run / "evaluation" / "samples").rglob("*")} == times

    def without_seconds(report):
        return [{name: value for name, value in m.items() if name != "seconds"} for m in report["measurements"]]

    assert without_seconds(report) == without_seconds(first_report)
    assert report["curves"] == first_report["curves"] and report["command"] == first_report["command"]


def test_sample_i_is_what_the_pipeline_draws_from_seed_plus_i(first_report, run, work):
    """Another first seed, batch size and number of samples do not change it."""
    settings = {"metrics": ("shift",), "weights": ("ema",), "seed": 60, "batch_size": 24, "num_samples": 16}
    evaluate_here(work, run, "seed 60", **settings)
    assert len(shard_files(work / "seed 60", seed=60)) == 1 and not shard_files(work / "seed 60")
    samples = saved_samples(run)
    assert samples.shape == (128, 1, 16, 16) and samples.dtype == np.uint8
    assert max_difference(saved_samples(work / "seed 60", seed=60), samples[60:124]) <= 1
    assert max_difference(samples[60:124], samples[:64]) > 50
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    for sampler in ({"steps": 4, "eta": 1}, {"steps": 8, "eta": 0}):
        images = pipe(seeds=[3, 70], num_inference_steps=sampler["steps"], eta=sampler["eta"], output_type="np").images
        pixels = (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
        assert max_difference(pixels, saved_samples(run, **sampler)[[3, 70]]) <= 1


KILLED = """
import io, os, runpy, signal, sys
import numpy as np
save, calls = np.save, []

def save_once_and_die(file, pixels):
    calls.append(None)
    if len(calls) == 1:
        return save(file, pixels)
    content = io.BytesIO()
    save(content, pixels)
    file.write(content.getvalue()[:5000])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.save = save_once_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_evaluation_continues_after_a_kill_with_the_same_samples(first_report, run, work):
    """The process is killed in the middle of writing its second shard."""
    settings = {"metrics": ("kernel",), "weights": ("ema",)}
    command = arguments(work, run, "killed", **settings)
    run_in_child(["-c", KILLED], "evaluate.py", command, cwd=work, expected=-signal.SIGKILL)
    (complete,) = shard_files(work / "killed")
    assert sorted(file.suffix[:4] for file in complete.parent.iterdir()) == [".npy", ".tmp"]
    assert not (work / "killed" / "report.json").exists()
    time = complete.stat().st_mtime_ns
    report = evaluate_here(work, run, "killed", **settings)
    assert complete.stat().st_mtime_ns == time
    assert np.array_equal(saved_samples(work / "killed"), saved_samples(run))
    value = find_measurement(first_report, "kernel_distance", primary=True)["value"]
    assert find_measurement(report, "kernel_distance")["value"] == value


def test_two_processes_draw_and_measure_the_same(first_report, run, work):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = {"weights": ("ema",), "metrics": ("kernel", "bound", "flow"), "num_flow_images": 2}
    output = run_in_child(launcher, "evaluate.py", arguments(work, run, "two", **settings), cwd=work)
    assert output.count("The report: ") == 1
    assert [file.name for file in shard_files(work / "two")] == ["00000.npy", "00001.npy"]
    assert np.array_equal(saved_samples(work / "two"), saved_samples(run))
    report = json.loads((work / "two" / "report.json").read_text())
    assert report["num_processes"] == 2
    for kind in ("fixed_small", "fixed_large"):
        name = f"bits per dimension, variational bound, {kind}, {STRATA} timesteps per image"
        two, one = (find_measurement(r, "bits_per_dim", weights="EMA", name=name) for r in (report, first_report))
        assert two["value"] == pytest.approx(one["value"], rel=1e-6)
        assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-5)
        assert two["n"] == NUM_BOUND_IMAGES
    assert find_measurement(report, "bits_per_dim_ode")["n"] == 2
    value = find_measurement(first_report, "kernel_distance", primary=True)["value"]
    assert find_measurement(report, "kernel_distance")["value"] == value


def test_samples_of_another_precision_have_another_folder(first_report, run, work):
    settings = {"metrics": ("shift",), "weights": ("ema",), "num_samples": 16, "num_inference_steps": (2,)}
    report = evaluate_here(work, run, "bf16", mixed_precision="bf16", **settings)
    assert report["precision"] == "bf16"
    samples = saved_samples(work / "bf16", steps=2, precision="bf16")
    assert not shard_files(work / "bf16", steps=2)
    assert 0 < np.abs(samples - saved_samples(run, steps=4)[:64].astype(float)).mean() < 100


def test_a_plot_of_an_earlier_evaluation_is_not_shown(first_report, run, work):
    (work / "stale" / "evaluation").mkdir(parents=True)
    shutil.copy(run / "evaluation" / "nearest.png", work / "stale" / "evaluation")
    evaluate_here(work, run, "stale", metrics=("bound",), weights=("ema",))
    assert "nearest" not in (work / "stale" / "report.md").read_text()


# ---- Other data and other models -------------------------------------------------------------------------------------


def test_a_run_without_held_out_images(work, image_folder, monkeypatch):
    """The default extractor is trained on all images, and measures that need held-out images are left out."""
    model = train(work, "all images", train_data_dir=image_folder, max_train_steps=1, validation_steps=0)
    calls = []

    def quick_extractor(which, *, images, labels, cache_dir, device):
        calls.append((which, len(images), labels, cache_dir))
        return make_extractor("pixels", images=images)

    monkeypatch.setattr(evaluator, "make_extractor", quick_extractor)
    report = evaluate_here(work, model, num_samples=16, num_reference=0, extractor=("classifier",))
    assert calls == [("classifier", 40, None, work / "cache" / "features")]
    assert {m["measure"] for m in report["measurements"]} == {
        "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "mean_shift", "std_ratio",
    }  # fmt: skip
    assert all(m["real_data_baseline"] is not None for m in report["measurements"])
    assert report["real_data_baseline"] == {"description": "training images", "n": 16}
    assert report["held_out"] == {"description": "nothing", "n": 0} and report["curves"] == []
    assert any(warning.startswith("fewer than 2 images are held out") for warning in report["warnings"])


def test_data_other_than_the_training_data_gives_a_warning(work, run, image_folder):
    settings = {"num_samples": 16, "weights": ("ema",), "num_reference": 0}
    report = evaluate_here(work, run, "other data", train_data_dir=str(image_folder), **settings)
    (warning,) = [warning for warning in report["warnings"] if "was trained on other images" in warning]
    assert "8192 of 8192 moons" in warning and "may have seen the images that are held out" in warning
    assert report["reference"]["description"] == "all 38 images of 40 images of folder images"
    assert "training" not in report["real_data_baseline"]["description"]
    assert report["held_out"] == {"description": report["held_out"]["description"], "n": 2}
    assert find_measurement(report, "coverage")["real_data_baseline"] is not None
    assert find_measurement(report, "memorisation")["real_data_baseline"] == 0.5
    assert [m["n"] for m in report["measurements"] if m["measure"] == "bits_per_dim"] == [2, 2]
    assert report["data"] == "40 images of folder images"


def test_a_saved_pipeline_needs_an_output_dir_and_data(saved_pipeline, work):
    with pytest.raises(ValueError, match="give --output_dir"):
        evaluate_here(work, saved_pipeline)
    with pytest.raises(ValueError, match="give --dataset_name or --train_data_dir"):
        evaluate_here(work, saved_pipeline, "of saved")
    assert not (saved_pipeline / "evaluation").exists()
    report = evaluate_here(work, saved_pipeline, "of saved", metrics=("bound",), dataset_name="moons")
    assert {m["weights"] for m in report["measurements"]} == {"EMA"}
    assert any(warning.startswith("it is not known how this model was trained") for warning in report["warnings"])
    assert report["step"] is None


def test_another_scheduler_is_sampled_but_has_no_bound(run, work):
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    DDPMPipeline(pipe.unet, scheduler).save_pretrained(work / "ddim")
    settings = {"dataset_name": "moons", "num_samples": 16}
    for metrics in (("kernel", "bound"), ("kernel", "flow")):
        with pytest.raises(ValueError, match="DDIMScheduler"):
            evaluate_here(work, work / "ddim", "of ddim", metrics=metrics, **settings)
    assert not (work / "of ddim").exists()
    report = evaluate_here(work, work / "ddim", "of ddim", metrics=("kernel",), eta=(0.0,), **settings)
    assert report["measurements"][0]["sampler"].startswith("DDIMScheduler, eta 0")


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": (4, 21)}, "num_inference_steps has 21: give at most 20"),
        ({"strata": 20}, "strata is 20: give less than 20"),
        ({"extractor": ("eyes",)}, "extractor is 'eyes'"),
        ({"train_data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_sampling(run, work, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate_here(work, run, "mistake", **settings)
    assert not (work / "mistake" / "evaluation" / "samples").exists()


def test_a_model_with_classes_without_names_is_refused(work, run):
    scheduler = DDPMScheduler.from_pretrained(run / "pipeline" / "scheduler")
    DDPMPipeline(tiny_unet(1, num_class_embeds=3), scheduler).save_pretrained(work / "classes")
    with pytest.raises(ValueError, match="classes has classes without names"):
        evaluate_here(work, work / "classes", "mistake")


def test_images_with_other_channels_are_refused(run, work):
    (work / "colour").mkdir()
    Image.new("RGB", (16, 16), "red").save(work / "colour" / "red.png")
    with pytest.raises(ValueError, match="the images have 3 channels, the model has 1"):
        evaluate_here(work, run, "mistake", train_data_dir=str(work / "colour"))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("strata is 20"), 2, "evaluate.py: strata is 20\n"),
        (FileNotFoundError(2, "No such file", "nowhere"), 2, "nowhere"),
        (OSError(28, "No space left on device"), 2, "runs/x cannot be written: [Errno 28] No space"),
        (KeyboardInterrupt(), 130, "evaluate.py: interrupted"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(config):
        raise error

    monkeypatch.setattr(script, "evaluate", fail)
    assert script.main(["runs/x"]) == code
    assert message in capsys.readouterr().err
    monkeypatch.setattr(script, "evaluate", lambda config: None)
    assert script.main(["runs/x"]) == 0
