"""training/evaluate.py on a run of a few steps: its report against the same measures taken by hand, and what it keeps.

Most runs happen in this process, which has imported everything; the first, a killed and a shared one are children.
"""

import hashlib
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, fidelity, likelihood
from ddpm_pipeline.features import extract_features, make_extractor
from ddpm_pipeline.pixels import from_pixels, to_pixels
from tests.short_run import SHORT_RUN, run_here, run_in_child
from training import evaluate
from training.data.cache import load_images
from training.data.split import DataSplit
from training.evaluation import measures, report
from training.evaluation.samples import SHARD, Model, Setting, Shards, load_models, sample
from training.hub import stage

TRAINING = Path(__file__).parents[1] / "training"
UNET = Path("pipeline", "unet", "diffusion_pytorch_model.safetensors")
CPU = torch.device("cpu")

TRAINED = SHORT_RUN | {
    "train_batch_size": 4,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 6,
    "validation_steps": 6,
    "num_validation_images": 2,
}
NUMBER, REFERENCE, BOUND, STRATA = 80, 200, 10, 8
# 80 samples are two shards.
OPTIONS = {
    "num_samples": NUMBER,
    "num_inference_steps": 4,
    "num_reference": REFERENCE,
    "num_bound_images": BOUND,
    "strata": STRATA,
    "extractor": "pixels",
    "cpu_threads": 1,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


def words(work, model, output_dir=None, **options):
    """The command line of an evaluation with OPTIONS and these."""
    options = {"cache_dir": work / "cache", **OPTIONS, **options}
    if output_dir is not None:
        options["output_dir"] = work / output_dir
    return [str(model), *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def measure(work, model, output_dir=None, **options):
    """Evaluate in this process, and give the report."""
    assert run_here("evaluate.py", words(work, model, output_dir, **options)) == 0
    return json.loads(((work / output_dir if output_dir else Path(model)) / "report.json").read_text())


def train(work, name, **options):
    options = {"output_dir": work / name, "cache_dir": work / "cache", **TRAINED, **options}
    assert run_here("train.py", [f"--{option}={value}" for option, value in options.items()]) == 0
    return work / name


@pytest.fixture(scope="module")
def run(work):
    """Six steps of 16 x 16 moons."""
    return train(work, "run", dataset_name="moons", resolution=16)


@pytest.fixture(scope="module")
def first(work, run):
    """The report of an evaluation by a process of its own."""
    options = {"num_inference_steps": "4,8", "eta": "1,0"}
    output = run_in_child([], "evaluate.py", words(work, run, **options), cwd=work)
    assert "The report: " in output
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def unseen(work):
    """The moons' test split."""
    return np.asarray(load_images(dataset_name="moons", split="test", resolution=16, cache_dir=work / "cache").images)


@pytest.fixture(scope="module")
def pictures(work):
    """A folder of 40, of which 2 are held out."""
    (work / "pictures").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(work / "pictures" / f"{i}.png")
    return work / "pictures"


@pytest.fixture(scope="module")
def seen(work):
    return np.asarray(load_images(dataset_name="moons", resolution=16, cache_dir=work / "cache").images)


def shards(output_dir, weights="ema", steps=4, eta=1, seed=0, precision="float32"):
    """The files of one setting."""
    return sorted(output_dir.glob(f"evaluation/samples/{weights}-*-steps{steps}-eta{eta}-seed{seed}-{precision}/*.npy"))


def samples(output_dir, **setting):
    return np.concatenate([np.load(file) for file in shards(output_dir, **setting)])


def differ(a, b):
    """The largest difference, in levels of brightness."""
    return np.abs(a.astype(int) - b.astype(int)).max()


def row_of(found, measure, **wanted):
    (row,) = [row for row in found["measurements"] if row | {"measure": measure, **wanted} == row]
    return row


# ---- The report ------------------------------------------------------------------------------------------------------


def test_the_report_has_all_its_fields(first, run):
    assert first.keys() == {
        "weights_sha256", "command", "measurements", "warnings", "curves", "data", "reference", "floor", "held_out",
        "extractors", "step", "precision", "seconds", "num_processes", "device", "date", "commit", "versions",
    }  # fmt: skip
    assert first["weights_sha256"] == hashlib.sha256((run / UNET).read_bytes()).hexdigest()
    assert (first["step"], first["precision"], first["num_processes"]) == (6, "float32", 1)
    assert first["reference"]["n"] == REFERENCE and first["floor"] == {"words": "held-out pictures", "n": NUMBER}
    assert first["held_out"]["n"] == 1024 and "1024 moons" in first["held_out"]["words"]
    assert [one["name"] for one in first["extractors"]] == ["pixels-16x16"]
    assert any("Frechet distances of 80 samples are too large" in warning for warning in first["warnings"])
    fields = {
        "measure", "name", "value", "standard_error", "n", "extractor", "reference", "floor", "sampler",
        "num_inference_steps", "eta", "seed", "weights", "main",
    }  # fmt: skip
    for row in first["measurements"]:
        assert fields <= row.keys()
        assert math.isfinite(row["value"]) and row["standard_error"] >= 0
        assert row["n"] == (NUMBER if row["sampler"] else BOUND)


def test_every_setting_is_measured_and_of_raw_weights_the_first(first):
    of_samples = {"frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "memorisation"}
    of_samples |= {"mean_shift", "std_ratio"}
    found = {}
    for row in first["measurements"]:
        found.setdefault((row["weights"], row["num_inference_steps"], row["eta"], row["main"]), []).append(row)
    assert found.keys() == {
        ("EMA", 4, 1.0, True), ("EMA", 8, 1.0, False), ("EMA", 4, 0.0, False), ("EMA", 8, 0.0, False),
        ("raw", 4, 1.0, False), ("EMA", None, None, True), ("raw", None, None, False),
    }  # fmt: skip
    for (_, steps, eta, _), rows in found.items():
        if steps is None:
            assert [row["measure"] for row in rows] == ["bits_per_dim", "bits_per_dim"]
            assert all(row["floor"] is None for row in rows)
        else:
            assert {row["measure"] for row in rows} == of_samples and len(rows) == len(of_samples)
            assert all(row["floor"] is not None for row in rows)
            assert {row["sampler"] for row in rows} == {f"DDPMScheduler, eta {eta:g}, trailing"}
            assert {row["reference"] for row in rows} == {f"{REFERENCE} training pictures"}
    assert not any("FID" in row["name"] or "KID" in row["name"] for row in first["measurements"])
    values = {row["value"] for row in first["measurements"] if row["measure"] == "kernel_distance"}
    assert len(values) == 5


@pytest.mark.parametrize(
    ("weights", "steps", "eta"), [("EMA", 4, 1), ("EMA", 8, 0), ("raw", 4, 1)], ids=["main", "other", "raw"]
)
def test_the_distances_are_those_of_the_samples_that_were_kept(first, run, seen, unseen, weights, steps, eta):
    """Values and floors by hand; the reference is every 40.96th training picture, the floor every 12.8th held out."""
    drawn = samples(run, weights=weights.lower(), steps=steps, eta=eta)[:NUMBER]
    chosen = [i * 8192 // REFERENCE for i in range(REFERENCE)]
    reference, equal = seen[chosen], seen[chosen][[i * REFERENCE // NUMBER for i in range(NUMBER)]]
    real = unseen[[i * 1024 // NUMBER for i in range(NUMBER)]]
    extractor = make_extractor("pixels", images=seen[:2])
    of_drawn, of_reference, of_equal, of_real, of_unseen = (
        extract_features(extractor, pixels) for pixels in (drawn, reference, equal, real, unseen)
    )
    truth = {
        "frechet_distance": [fidelity.frechet_distance(x, of_reference) for x in (of_drawn, of_real)],
        "kernel_distance": [fidelity.kernel_distance(x, of_reference).value for x in (of_drawn, of_real)],
        "precision": [fidelity.precision_recall(x, of_equal)[0] for x in (of_drawn, of_real)],
        "recall": [fidelity.precision_recall(x, of_equal)[1] for x in (of_drawn, of_real)],
        "density": [fidelity.density_coverage(x, of_equal)[0] for x in (of_drawn, of_real)],
        "coverage": [fidelity.density_coverage(x, of_equal)[1] for x in (of_drawn, of_real)],
        "memorisation": [fidelity.memorisation(of_drawn, of_reference, of_unseen).value, 0.5],
        "mean_shift": [fidelity.channel_shift(x, reference)[0].mean.value for x in (drawn, real)],
        "std_ratio": [fidelity.channel_shift(x, reference)[0].std_ratio.value for x in (drawn, real)],
    }
    for name, (value, floor) in truth.items():
        row = row_of(first, name, weights=weights, num_inference_steps=steps, eta=eta)
        assert row["value"] == pytest.approx(value, rel=1e-6), name
        assert row["floor"] == pytest.approx(floor, rel=1e-6), name
    for name, error in {
        "frechet_distance": fidelity.jackknife(fidelity.frechet_distance, of_drawn, of_reference).standard_error,
        "kernel_distance": fidelity.kernel_distance(of_drawn, of_reference).standard_error,
        "recall": fidelity.jackknife(
            lambda x, y: fidelity.precision_recall(x, y)[1], of_drawn, of_equal
        ).standard_error,
        "mean_shift": fidelity.channel_shift(drawn, reference)[0].mean.standard_error,
    }.items():
        row = row_of(first, name, weights=weights, num_inference_steps=steps, eta=eta)
        assert row["standard_error"] == pytest.approx(error, rel=1e-6), name
    assert truth["precision"][1] > 0.8 and truth["coverage"][1] > 0.8  # real pictures are like real pictures
    assert first["reference"]["sha256"] == hashlib.sha256(reference.tobytes()).hexdigest()


def test_the_bits_are_those_of_the_bound(first, run, unseen):
    """Of both variances, and of both weights."""
    x_0 = torch.from_numpy(unseen[[i * 1024 // BOUND for i in range(BOUND)]] / 127.5 - 1).float()
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    for weights in ("EMA", "raw"):
        if weights == "raw":
            pipe.unet.load_state_dict(load_file(run / "checkpoint-000006" / "model.safetensors"))
        for variance_type in ("fixed_small", "fixed_large"):
            walk = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
            bound = likelihood.variational_bound(
                lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0], walk, x_0, strata=STRATA
            )  # fmt: skip
            bits = likelihood.bits_per_dim(bound.total, x_0.shape[1:])
            name = f"bits per dimension, bound, {variance_type}, {STRATA} steps of each picture"
            row = row_of(first, "bits_per_dim", weights=weights, name=name)
            assert row["value"] == pytest.approx(bits.mean().item(), rel=1e-5)
            assert row["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(BOUND), rel=1e-4)
            (curve,) = [c for c in first["curves"] if (c["weights"], c["variance_type"]) == (weights, variance_type)]
            assert curve["share"] == bound.share.tolist() and sum(curve["share"]) == 19
            total = curve["prior"] + sum(n * bits for n, bits in zip(curve["share"], curve["step"])) + curve["decoder"]
            assert total == pytest.approx(row["value"], rel=1e-4)
            progressive = likelihood.rate_distortion(bound, x_0.shape[1:])
            assert curve["rate_distortion"]["distortion"] == pytest.approx(progressive.distortion.tolist(), rel=1e-4)


def test_the_report_can_be_read_and_its_plots_open(first, run):
    text = (run / "report.md").read_text()
    shown = re.findall(r"!\[\w+\]\((evaluation/\w+\.png)\)", text)
    wanted = ["frechet_distance", "kernel_distance", "bound", "rate_distortion", "nearest"]
    assert shown == [f"evaluation/{name}.png" for name in wanted]
    for name in shown:
        with Image.open(run / name) as picture:
            picture.load()
            assert min(picture.size) > 30
    row = row_of(first, "kernel_distance", weights="raw")
    assert f"| {row['value']:.4g} &plusmn; {row['standard_error']:.2g} |" in text
    assert "| raw | DDPMScheduler, eta 1, trailing | 4 | 80 |" in text
    assert text.count("| real pictures |") == 2  # features, and the pixels themselves
    assert "Frechet distances of 80 samples are too large" in text


def test_nothing_in_it_is_of_this_machine(first, run, work):
    for file in ("report.json", "report.md"):
        text = (run / file).read_text()
        assert work.name not in text and Path.home().name not in text
        assert not re.search(r"""(^|[\s"'(=`])[/~]\w""", text, re.MULTILINE)
    assert first["command"].startswith("accelerate launch training/evaluate.py runs/run --cache_dir=cache ")


def test_it_goes_onto_the_card(first, run, tmp_path):
    said = []
    stage.stage(run, tmp_path / "staged", repo_id="alice/moons", say=said.append)
    assert not [line for line in said if "report" in line]
    card = (tmp_path / "staged" / "README.md").read_text()
    row = row_of(first, "kernel_distance", weights="EMA", main=True)
    cells = [row["name"], f"{row['value']:.4g} &plusmn; {row['standard_error']:.2g}", f"{row['floor']:.4g}", "80"]
    assert " | ".join(cells) in card
    assert f"{row_of(first, 'kernel_distance', weights='raw')['value']:.4g} &plusmn;" not in card
    for row in first["measurements"]:
        if row["measure"] == "bits_per_dim" and row["weights"] == "EMA":
            assert f"| {row['name']} | {row['value']:.4g}" in card
    assert first["command"] in card and "was not measured" not in card
    assert json.loads((tmp_path / "staged" / "report.json").read_text()) == first


# ---- Samples that are kept -------------------------------------------------------------------------------------------


def test_a_second_time_no_sample_is_drawn_again(first, run, work, monkeypatch):
    def drawn_again(*args, **options):
        raise AssertionError("a sample is drawn")

    monkeypatch.setattr(DDPMPipeline, "__call__", drawn_again)
    before = {file: file.stat().st_mtime_ns for file in (run / "evaluation" / "samples").rglob("*")}
    assert len([file for file in before if file.suffix == ".npy"]) == 5 * 2
    kept = (run / "report.json").read_bytes()
    again = measure(work, run, num_inference_steps="4,8", eta="1,0")
    (run / "report.json").write_bytes(kept)
    assert {file: file.stat().st_mtime_ns for file in (run / "evaluation" / "samples").rglob("*")} == before

    def without_time(found):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in found["measurements"]]

    assert without_time(again) == without_time(first)
    assert again["curves"] == first["curves"]


def test_sample_i_is_what_the_pipeline_draws_from_seed_plus_i(first, run, work):
    """And another first seed, batch and number change nothing of it."""
    measure(work, run, "other", metrics="shift", weights="ema", seed=60, batch_size=24, num_samples=16)
    assert len(shards(work / "other", seed=60)) == 1 and not shards(work / "other")
    whole = samples(run)
    assert whole.shape == (128, 1, 16, 16) and whole.dtype == np.uint8
    assert differ(samples(work / "other", seed=60), whole[60:124]) <= 1
    assert differ(whole[60:124], whole[:64]) > 50
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    for setting in ({"steps": 4, "eta": 1}, {"steps": 8, "eta": 0}):
        drawn = pipe(seeds=[3, 70], num_inference_steps=setting["steps"], eta=setting["eta"], output_type="np").images
        pixels = (drawn * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
        assert differ(pixels, samples(run, **setting)[[3, 70]]) <= 1


KILLED = """
import io, os, runpy, signal, sys
import numpy as np
save, calls = np.save, []

def save_once_and_die(file, pixels):
    calls.append(None)
    if len(calls) == 1:
        return save(file, pixels)
    whole = io.BytesIO()
    save(whole, pixels)
    file.write(whole.getvalue()[:5000])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.save = save_once_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_after_a_kill_it_goes_on_and_draws_the_same(first, run, work):
    """The process is killed in the middle of writing its second shard."""
    options = {"metrics": "kernel", "weights": "ema"}
    run_in_child(
        ["-c", KILLED], "evaluate.py", words(work, run, "killed", **options), cwd=work, expected=-signal.SIGKILL
    )
    (whole,) = shards(work / "killed")
    assert [file.suffix[:4] for file in sorted(whole.parent.iterdir())] == [".npy", ".tmp"]
    assert not (work / "killed" / "report.json").exists()
    made = whole.stat().st_mtime_ns
    found = measure(work, run, "killed", **options)
    assert whole.stat().st_mtime_ns == made
    assert np.array_equal(samples(work / "killed"), samples(run))
    row = row_of(found, "kernel_distance")
    assert row["value"] == row_of(first, "kernel_distance", main=True)["value"]


def test_two_processes_draw_and_find_the_same(first, run, work):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command_line = words(work, run, "two", weights="ema", metrics="kernel,bound,flow", num_flow_images=2)
    output = run_in_child(launcher, "evaluate.py", command_line, cwd=work)
    assert output.count("The report: ") == 1
    assert [file.name for file in shards(work / "two")] == ["00000.npy", "00001.npy"]
    assert np.array_equal(samples(work / "two"), samples(run))
    found = json.loads((work / "two" / "report.json").read_text())
    assert found["num_processes"] == 2
    for name in ("fixed_small", "fixed_large"):
        wanted = f"bits per dimension, bound, {name}, {STRATA} steps of each picture"
        two, one = (row_of(which, "bits_per_dim", weights="EMA", name=wanted) for which in (found, first))
        assert two["value"] == pytest.approx(one["value"], rel=1e-6)
        assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-5)
        assert two["n"] == BOUND
    assert row_of(found, "bits_per_dim_flow")["n"] == 2
    assert row_of(found, "kernel_distance")["value"] == row_of(first, "kernel_distance", main=True)["value"]


def test_another_precision_is_kept_apart(first, run, work):
    options = {"metrics": "shift", "weights": "ema", "num_samples": 16, "num_inference_steps": 2}
    found = measure(work, run, "bf16", mixed_precision="bf16", **options)
    assert found["precision"] == "bf16"
    half = samples(work / "bf16", steps=2, precision="bf16")
    assert not shards(work / "bf16", steps=2)
    whole = samples(run, steps=4)
    assert 0 < np.abs(half - whole[:64].astype(float)).mean() < 100


# ---- A part of the measures ------------------------------------------------------------------------------------------


def test_the_bound_alone_draws_no_sample_and_can_take_all_steps(run, work, unseen):
    """What is said of samples alone stays unused: 50 steps, more than this walk has; more samples than a floor has."""
    unused = {"num_inference_steps": None, "num_samples": 2048, "num_reference": 0}
    found = measure(work, run, "bound", metrics="bound", weights="ema", strata=0, **unused)
    assert not (work / "bound" / "evaluation" / "samples").exists()
    names = [row["name"] for row in found["measurements"]]
    assert names == [f"bits per dimension, bound, {kind}, all steps" for kind in ("fixed_small", "fixed_large")]
    assert found["warnings"] == [] and [curve["share"] for curve in found["curves"]] == [[1] * 19] * 2
    assert re.findall(r"\((\S+png)\)", (work / "bound" / "report.md").read_text()) == [
        "evaluation/bound.png", "evaluation/rate_distortion.png",
    ]  # fmt: skip
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    x_0 = torch.from_numpy(unseen[[i * 1024 // BOUND for i in range(BOUND)]] / 127.5 - 1).float()
    bound = likelihood.variational_bound(lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0], pipe.scheduler, x_0)
    bits = likelihood.bits_per_dim(bound.total, x_0.shape[1:]).mean().item()
    assert row_of(found, "bits_per_dim", name=names[0])["value"] == pytest.approx(bits, rel=1e-5)


def test_the_flow(run, work, unseen):
    found = measure(work, run, "flow", metrics="flow", weights="ema", num_flow_images=2)
    (row,) = found["measurements"]
    assert (row["measure"], row["n"], found["curves"]) == ("bits_per_dim_flow", 2, [])
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    pixels = torch.from_numpy(unseen[[0, 512]])
    nats = likelihood.probability_flow_nats(
        lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0], pipe.scheduler, likelihood.dequantised(pixels),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    bits = likelihood.bits_per_dim(likelihood.discrete_nats(nats, (1, 16, 16), 256), (1, 16, 16))
    assert row["value"] == pytest.approx(bits.mean().item(), rel=1e-4)


def test_the_picture_of_an_earlier_model_is_not_shown(first, run, work):
    (work / "stale" / "evaluation").mkdir(parents=True)
    shutil.copy(run / "evaluation" / "nearest.png", work / "stale" / "evaluation")
    measure(work, run, "stale", metrics="bound", weights="ema")
    assert "nearest" not in (work / "stale" / "report.md").read_text()


def test_a_run_that_held_nothing_out(work, pictures, monkeypatch):
    """And the extractor, by default, which learns from all of it."""
    model = train(work, "all of it", train_data_dir=pictures, max_train_steps=1, validation_steps=0)
    asked = []

    def quick(which, *, images, labels, cache_dir, device):
        asked.append((which, len(images), labels, cache_dir))
        return make_extractor("pixels", images=images)

    monkeypatch.setattr(fidelity, "make_extractor", quick)
    found = measure(work, model, num_samples=16, num_reference=0, extractor=None)
    assert asked == [("classifier", 40, None, work / "cache" / "features")]
    assert {row["measure"] for row in found["measurements"]} == {
        "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "mean_shift", "std_ratio",
    }  # fmt: skip
    assert all(row["floor"] is not None for row in found["measurements"])
    assert found["floor"] == {"words": "training pictures", "n": 16}
    assert found["held_out"] == {"words": "nothing", "n": 0} and found["curves"] == []
    assert any(
        words.startswith("fewer than 2 pictures are held out, so there is no bound") for words in found["warnings"]
    )


def test_other_pictures_than_those_of_the_training_are_called_so(work, run, pictures):
    found = measure(work, run, "few", train_data_dir=pictures, num_samples=16, weights="ema", num_reference=0)
    (warning,) = [words for words in found["warnings"] if "was trained on other pictures" in words]
    assert "8192 of 8192 moons" in warning and "may have seen what is held out" in warning
    assert found["reference"]["words"] == "all 38 pictures of 40 images of folder pictures"
    assert "training" not in found["floor"]["words"]
    assert found["held_out"] == {"words": found["held_out"]["words"], "n": 2}
    assert row_of(found, "coverage")["floor"] is not None and row_of(found, "memorisation")["floor"] == 0.5
    assert [row["n"] for row in found["measurements"] if row["measure"] == "bits_per_dim"] == [2, 2]
    assert found["data"] == "40 images of folder pictures"


# ---- Models that are no run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(work, run):
    """A saved pipeline, of which is not known how it was trained."""
    shutil.copytree(run / "pipeline", work / "saved")
    (work / "saved" / "training.json").unlink()
    return work / "saved"


def test_a_saved_pipeline_needs_a_place_for_the_report_and_its_data(saved, work, capsys):
    assert run_here("evaluate.py", words(work, saved)) == 2
    assert "give --output_dir" in capsys.readouterr().err
    assert run_here("evaluate.py", words(work, saved, "of saved")) == 2
    assert "give --dataset_name or --train_data_dir" in capsys.readouterr().err
    assert not (saved / "evaluation").exists()
    found = measure(work, saved, "of saved", metrics="bound", dataset_name="moons")
    assert {row["weights"] for row in found["measurements"]} == {"EMA"}
    assert any(warning.startswith("nothing is known of how this model was trained") for warning in found["warnings"])
    assert found["step"] is None


def test_another_walk_has_samples_but_no_bound(run, work, capsys):
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    walk = DDIMScheduler.from_config(pipe.scheduler.config)
    DDPMPipeline(pipe.unet, walk).save_pretrained(work / "ddim")
    options = {"dataset_name": "moons", "num_samples": 16}
    for metrics in ("kernel,bound", "kernel,flow"):
        assert run_here("evaluate.py", words(work, work / "ddim", "of ddim", metrics=metrics, **options)) == 2
        assert "DDIMScheduler" in capsys.readouterr().err
    assert not (work / "of ddim").exists()
    found = measure(work, work / "ddim", "of ddim", metrics="kernel", eta=0, **options)
    assert found["measurements"][0]["sampler"].startswith("DDIMScheduler, eta 0")


def test_the_same_weights_with_another_walk_have_samples_of_their_own(run, work):
    assert load_models(str(run), ["ema"])[0].walk == load_models(str(work / "run"), ["raw"])[0].walk
    model = load_models(str(run), ["ema"])[0]
    other = work / "other walk"
    walk = DDPMScheduler.from_config(model.pipe.scheduler.config, variance_type="fixed_large")
    DDPMPipeline(model.pipe.unet, walk).save_pretrained(other)
    changed = load_models(str(other), ["ema"])[0]
    folders = [Shards(work, one, Setting(4, 1.0), 0, "float32").folder for one in (model, changed)]
    assert changed.sha256 == model.sha256 and folders[0] != folders[1]


def test_which_weights(run, work, saved):
    averaged, raw = load_models(str(run), ["ema", "raw"])
    assert (averaged.weights, raw.weights) == ("EMA", "raw")
    kept = run / "checkpoint-000006" / "model.safetensors"
    assert raw.sha256 == hashlib.sha256(kept.read_bytes()).hexdigest() != averaged.sha256
    for model, file in ((averaged, run / UNET), (raw, kept)):
        tensors = load_file(file)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.pipe.unet.state_dict().items())
        assert not model.pipe.unet.training
    assert [model.weights for model in load_models(str(run), ["raw"])] == ["raw"]
    assert [model.weights for model in load_models(str(saved), ["ema", "raw"])] == ["EMA"]
    with pytest.raises(ValueError, match=r"saved is no run with checkpoints: give --weights ema"):
        load_models(str(saved), ["raw"])
    with pytest.raises(ValueError, match="has no pipeline/ and is no saved pipeline"):
        load_models(str(work), ["ema"])


def test_raw_weights_of_another_step_or_of_none_are_refused(run, tmp_path):
    shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"there are no raw weights: .* give --weights ema"):
        load_models(str(tmp_path), ["ema", "raw"])
    (tmp_path / "checkpoint-000006").symlink_to(run / "checkpoint-000006")
    assert len(load_models(str(tmp_path), ["ema", "raw"])) == 2
    record = tmp_path / "pipeline" / "training.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"step": 3}))
    with pytest.raises(ValueError, match=r"is of step 6, pipeline/ of step 3: give --weights ema"):
        load_models(str(tmp_path), ["ema", "raw"])
    assert [model.weights for model in load_models(str(tmp_path), ["ema"])] == ["EMA"]


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ({}, 2),
        ({"validation_split": "valid", "dataset_config_name": "x"}, 2),  # of the data set that is not this folder
        ({"validation_split": "none", "dataset_config_name": "x"}, 0),
        ({"validation_steps": 0}, 0),
    ],
)
def test_what_is_held_out_is_what_was_while_training(work, pictures, trained, held_out):
    network = SimpleNamespace(config=SimpleNamespace(sample_size=16, in_channels=1))
    config = {"dataset_name": "user/set", **trained}
    model = Model(SimpleNamespace(unet=network), "EMA", "", "", {"config": config})
    given = evaluate.parser().parse_args(["x", f"--train_data_dir={pictures}", f"--cache_dir={work / 'cache'}"])
    parts = evaluate.load_pictures(given, model)
    assert (len(parts.train_indices), len(parts.held_out)) == (40 - held_out, held_out)
    given = evaluate.parser().parse_args(["x", "--dataset_name=moons", f"--cache_dir={work / 'cache'}"])
    parts = evaluate.load_pictures(given, model)
    assert (len(parts.train_indices), len(parts.held_out)) == (
        8192,
        1024,
    )  # the test split, whatever was held out of it


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("num_samples", 15, "--num_samples is 15: give at least 16"),
        ("num_reference", -1, "--num_reference is -1"),
        ("num_reference", 3, "--num_reference is 3: give at least 16, or 0"),
        ("num_bound_images", 1, "--num_bound_images is 1"),
        ("num_flow_images", 1, "--num_flow_images is 1"),
        ("strata", -1, "--strata is -1"),
        ("strata", 7, "--strata is 7: the error of fewer than 8"),
        ("batch_size", 0, "--batch_size is 0"),
        ("seed", -1, "--seed is -1"),
        ("seed", 2**32, f"--seed is {2**32}"),
        ("cpu_threads", 0, "--cpu_threads is 0"),
        ("metrics", "frechet,fid", "--metrics has 'fid'"),
        ("metrics", "", "--metrics has ''"),
        ("metrics", "bound,bound", "--metrics names something twice"),
        ("weights", "best", "--weights has 'best'"),
        ("eta", "0,1.5", "--eta has 1.5"),
        ("eta", "nan", "--eta has nan"),
        ("num_inference_steps", "10,0", "--num_inference_steps has 0"),
        ("num_inference_steps", "10,10", "--num_inference_steps names something twice"),
        ("train_data_dir", "x --dataset_name=moons", "are both given"),
        # What argparse itself says of words that are no numbers.
        ("num_samples", "many", "'many'"),
        ("eta", "0;1", "'0;1'"),
        ("num_inference_steps", "1.5", "'1.5'"),
        ("mixed_precision", "half", "'half'"),
        ("samples", "5", "--samples"),
    ],
)
def test_a_flag_that_cannot_be_ends_with_2_and_its_value(capsys, flag, value, message):
    try:
        code = evaluate.main(["runs/x", *f"--{flag}={value}".split(" ")])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": "4,21"}, "--num_inference_steps has 21: the walk of this model has 20 steps"),
        ({"extractor": "eyes"}, "extractor is 'eyes'"),
        ({"train_data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_go_with_the_model_ends_with_2_before_anything_is_drawn(run, work, capsys, options, message):
    assert run_here("evaluate.py", words(work, run, "mistake", **options)) == 2
    assert message in capsys.readouterr().err
    assert not (work / "mistake" / "evaluation" / "samples").exists()


def test_pictures_of_other_channels_are_refused(run, work, capsys):
    (work / "colour").mkdir()
    Image.new("RGB", (16, 16), "red").save(work / "colour" / "red.png")
    assert run_here("evaluate.py", words(work, run, "mistake", train_data_dir=work / "colour")) == 2
    assert "the pictures have 3 channels, the model 1" in capsys.readouterr().err


# ---- The parts by themselves -----------------------------------------------------------------------------------------


def numbered(first, number, dtype=np.uint8):
    return np.arange(first, first + number, dtype=dtype)[:, None, None, None].repeat(2, 2).repeat(2, 3)


def values(pixels):
    return pixels[:, 0, 0, 0].tolist()


def parts_of(learned_from, held_out, total=None):
    """Pictures 0, 1, ..., of which some are learned from, and held-out pictures 100, 101, ..."""
    data = SimpleNamespace(images=numbered(0, total or learned_from))
    return DataSplit(data, np.arange(learned_from), numbered(100, held_out), "")


def test_the_floor_is_of_held_out_pictures_if_they_are_enough():
    warnings = []
    real = measures.real_pictures(parts_of(40, 20), 10, 10, warnings)
    assert values(real.reference) == list(range(0, 40, 4)) and real.reference_words == "10 training pictures"
    assert values(real.floor) == list(range(100, 120, 2)) and real.floor_words == "held-out pictures"
    assert len(real.held_out) == 20 and not warnings


def test_else_of_training_pictures_beside_the_reference():
    warnings = []
    real = measures.real_pictures(parts_of(40, 9), 20, 10, warnings)
    assert values(real.reference) == list(range(0, 40, 2))
    assert values(real.floor) == list(range(1, 40, 4)) and real.floor_words == "training pictures"
    assert real.apart.all() and not warnings


@pytest.mark.parametrize("held_out", [0, 9])
@pytest.mark.parametrize("number_of_reference", [0, 35, 99])
def test_else_of_training_pictures_which_the_reference_of_the_floor_is_without(number_of_reference, held_out):
    warnings = []
    real = measures.real_pictures(parts_of(40, held_out), number_of_reference, 10, warnings)
    assert values(real.floor) == list(range(0, 40, 4))
    compared = values(real.reference[real.apart])
    assert set(compared) == set(values(real.reference)) - set(values(real.floor))
    assert len(real.held_out) == held_out and not warnings


def test_a_floor_of_fewer_than_the_samples_is_at_most_half_and_warned_of():
    warnings = []
    real = measures.real_pictures(parts_of(40, 9), 0, 30, warnings)
    assert len(real.floor) == 20 and real.apart.sum() == 20
    assert len(warnings) == 1 and "the floor is of 20 pictures" in warnings[0]


def test_of_too_few_pictures_there_is_no_floor_and_a_warning():
    warnings = []
    real = measures.real_pictures(parts_of(10, 3), 0, 16, warnings)
    assert len(real.floor) == 0
    assert warnings == ["there is no floor: 10 pictures are too few to take 6 out"]


def test_a_floor_of_six_is_enough_for_every_measure(tmp_path):
    generator = np.random.default_rng(0)
    drawn, learned, held_out = (generator.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8) for n in (16, 12, 6))
    parts = DataSplit(SimpleNamespace(images=learned), np.arange(12), held_out, "")
    real = measures.real_pictures(parts, 0, 16, [])
    extractor = make_extractor("pixels", images=learned)
    rows = [*measures.compare(drawn, real, extractor, evaluate.METRICS, tmp_path), *measures.shifts(drawn, real)]
    assert len(rows) == 9 and all(row["floor"] is not None for row in rows)


def test_copies_of_training_pictures_are_found_and_copies_of_held_out_ones_are_not_taken_for_them(tmp_path):
    generator = np.random.default_rng(0)
    learned, held_out = (generator.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8) for _ in range(2))
    real = measures.real_pictures(DataSplit(SimpleNamespace(images=learned), np.arange(20), held_out, ""), 0, 20, [])
    extractor = make_extractor("pixels", images=learned)
    for drawn, value in ((learned, 1), (held_out, 0.5)):
        (row,) = measures.compare(drawn, real, extractor, ["memorisation"], tmp_path)
        assert row["value"] == pytest.approx(value) and row["floor"] == 0.5


def test_what_is_held_out_of_the_data_is_not_in_the_reference():
    parts = DataSplit(
        SimpleNamespace(images=numbered(0, 40)), np.setdiff1d(np.arange(40), [19, 39]), numbered(100, 2), ""
    )
    assert set(values(measures.real_pictures(parts, 0, 10, []).reference)) == set(range(40)) - {19, 39}
    some = measures.real_pictures(parts, 19, 19, [])
    assert set(values(some.reference)) | set(values(some.floor)) == set(range(40)) - {19, 39}


@pytest.mark.parametrize(
    ("number", "wanted", "indices"), [(10, 4, [0, 2, 5, 7]), (4, 4, [0, 1, 2, 3]), (3, 9, [0, 1, 2]), (5, 0, [])]
)
def test_evenly(number, wanted, indices):
    assert measures.evenly(number, wanted).tolist() == indices


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_value_of_brightness_there_and_back(dtype):
    white = np.iinfo(dtype).max
    pixels = np.arange(white + 1, dtype=dtype).reshape(-1, 1, 1, 256)
    x = from_pixels(pixels)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    truth = pixels.astype(np.float64) * 2 / white - 1
    assert np.abs(x.double().numpy() - truth).max() < 1e-6
    assert np.array_equal(to_pixels(x, dtype), pixels) and to_pixels(x, dtype).dtype == dtype
    beyond = torch.tensor([-1.5, -1.0, 1.0, 1.5, 0.49 / white, 0.51 * 2 / white]).view(1, 1, 2, 3)
    middle = white // 2
    assert to_pixels(beyond, dtype).flatten().tolist() == [0, 0, white, white, middle + 1, middle + 1]


def test_a_shard_that_is_half_written_is_not_taken(tmp_path, monkeypatch):
    model = Model(None, "EMA", "0" * 64, "1" * 64, {})
    kept = Shards(tmp_path, model, Setting(5, 0.5), 7, "bf16")
    assert kept.missing(2 * SHARD + 1) == [0, 1, 2]
    first, last = numbered(0, SHARD), numbered(100, SHARD)
    kept.save(1, last)
    assert kept.missing(2 * SHARD) == [0] and kept.missing(SHARD) == [0]

    def half(file, pixels):
        file.write(pixels.tobytes()[:100])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", half)
        with pytest.raises(OSError, match="no space left"):
            kept.save(0, first)
    assert kept.missing(2 * SHARD) == [0]
    kept.save(0, first)
    assert kept.missing(2 * SHARD) == [] and kept.missing(2 * SHARD + 1) == [2]
    assert np.array_equal(kept.load(SHARD + 2), np.concatenate([first, last[:2]]))
    others = [
        Shards(tmp_path, one, setting, seed, precision).folder
        for one, setting, seed, precision in (
            (model._replace(weights="raw"), Setting(5, 0.5), 7, "bf16"),
            (model._replace(sha256="2" * 64), Setting(5, 0.5), 7, "bf16"),
            (model._replace(walk="2" * 64), Setting(5, 0.5), 7, "bf16"),
            (model, Setting(6, 0.5), 7, "bf16"),
            (model, Setting(5, 0.25), 7, "bf16"),
            (model, Setting(5, 0.5), 8, "bf16"),
            (model, Setting(5, 0.5), 7, "float32"),
        )
    ]
    assert len({kept.folder, *others}) == 8


class Drawing:
    """A pipeline that draws, from a seed, a picture that is as bright as the seed is large."""

    def __init__(self):
        self.asked = []

    def to(self, device):
        return self

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, *, seeds, **options):
        self.asked.append((len(seeds), options))
        return (torch.tensor(seeds).view(-1, 1, 1, 1) / 500 - 1,)


def one_of(number, process=0):
    """What of an Accelerator is asked for: one of so many processes."""
    return SimpleNamespace(
        process_index=process, num_processes=number, is_main_process=process == 0, device=CPU, mixed_precision="no",
        wait_for_everyone=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize("pixel_type", [np.uint8, np.uint16])
def test_each_process_draws_the_shards_that_are_missing(tmp_path, pixel_type):
    pipe = Drawing()
    model = Model(pipe, "EMA", "0" * 64, "1" * 64, {})
    kept = Shards(tmp_path, model, Setting(7, 0.5), 100, "float32")
    options = {"pixel_type": np.dtype(pixel_type), "batch_size": 25}
    assert sample(model, Setting(7, 0.5), kept, 4 * SHARD - 5, processes=one_of(2, process=1), **options) > 0
    assert kept.missing(4 * SHARD) == [0, 2]
    assert [number for number, _ in pipe.asked] == [25, 25, 14] * 2
    assert pipe.asked[0][1] == {"num_inference_steps": 7, "eta": 0.5, "output_type": "latent", "return_dict": False}
    sample(model, Setting(7, 0.5), kept, 4 * SHARD, processes=one_of(1), **options)
    assert len(pipe.asked) == 12
    assert sample(model, Setting(7, 0.5), kept, 4 * SHARD, processes=one_of(1), **options) == 0
    assert len(pipe.asked) == 12
    pixels = kept.load(4 * SHARD)
    white = np.iinfo(pixel_type).max
    assert pixels.dtype == pixel_type and pixels.shape == (256, 1, 1, 1)
    assert np.abs(pixels[:, 0, 0, 0] - np.arange(100, 356) / 1000 * white).max() <= 0.51


@pytest.mark.parametrize(("number", "processes"), [(7, 1), (7, 2), (2, 3), (20, 3)])
def test_processes_share_out_the_held_out_pictures(number, processes):
    """Each is measured once, and a process may have none."""
    seen = {}
    for process in range(processes):
        options = {"batch_size": 2, "seed": 0, "processes": one_of(processes, process)}
        pictures = measures.HeldOut(numbered(100, 10), **options)
        for index, pixels in pictures._batches(number, ""):
            assert 0 < len(index) <= 2
            seen |= dict(zip(index.tolist(), values(pixels), strict=True))
    wanted = 100 + measures.evenly(10, number)
    assert [seen[i] for i in range(len(wanted))] == wanted.tolist() and len(seen) == len(wanted)


def test_the_nearest_picture_shows_samples_above_what_they_are_nearest_to(tmp_path):
    generator = np.random.default_rng(0)
    reference = generator.integers(10, 246, (20, 1, 8, 8), dtype=np.uint8)
    drawn = reference[[5, 11, 2]] + np.array([9, 1, 4], dtype=np.uint8)[:, None, None, None]
    extractor = make_extractor("pixels", images=reference)
    picture = report.nearest_picture(drawn, reference, extractor, tmp_path, number=2)
    scale = picture.width // (2 * 8 + 3 * 2)
    pixels = np.asarray(picture)[::scale, ::scale]
    for column, (k, i) in enumerate([(1, 11), (2, 2)]):
        left = 2 + column * 10
        assert np.array_equal(pixels[2:10, left : left + 8], drawn[k, 0])
        assert np.array_equal(pixels[12:20, left : left + 8], reference[i, 0])


@pytest.mark.parametrize(
    ("model", "more", "shown"),
    [
        ("runs/moons", [], "runs/moons"),
        ("/data/alice/runs/moons", [], "runs/moons"),
        ("/data/alice/lr=0.1/moons", [], "runs/moons"),
        ("../moons", ["--seed=3"], "runs/moons --seed=3"),
        ("runs/moons", ["--cache_dir", "/data/alice/cache"], "runs/moons --cache_dir cache"),
        ("runs/moons", ["--cache_dir=/data/a=b/cache"], "runs/moons --cache_dir=cache"),
        ("runs/moons", ["--extractor=~/inception.pt"], "runs/moons --extractor=inception.pt"),
        ("runs/moons", ["--metrics", "frechet,bound"], "runs/moons --metrics frechet,bound"),
    ],
)
def test_the_command_without_folders_of_this_machine(monkeypatch, model, more, shown):
    monkeypatch.setattr(sys, "argv", ["training/evaluate.py", model, *more])
    given = evaluate.parser().parse_args([model, *more])
    assert evaluate.command(given) == f"accelerate launch training/evaluate.py {shown}"


def test_ctrl_c_leaves_no_traceback_and_what_was_made(run, monkeypatch, capsys):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    assert evaluate.main([str(run)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_damaged_file_of_samples_is_made_again(tmp_path):
    shards = Shards(tmp_path, Model(None, "EMA", "0" * 64, "1" * 64, {}), Setting(5, 1.0), 0, "float32")
    whole = np.zeros((64, 1, 2, 2), np.uint8)
    shards.save(0, whole)
    shards.save(1, whole)
    assert shards.missing(128) == []
    file = next(shards.folder.glob("00001.npy"))
    file.write_bytes(file.read_bytes()[:90])
    assert shards.missing(128) == [1]


def test_the_floor_is_not_measured_against_itself(tmp_path):
    """Of 24 training pictures 12 are the floor; with them in the reference it would be too low."""
    generator = np.random.default_rng(1)
    drawn, learned = (generator.integers(0, 256, (n, 1, 2, 2), dtype=np.uint8) for n in (16, 24))
    real = measures.real_pictures(DataSplit(SimpleNamespace(images=learned), np.arange(24), learned[:0], ""), 0, 16, [])
    extractor = make_extractor("pixels", images=learned)
    floor, apart = (extract_features(extractor, pixels) for pixels in (learned[::2], np.delete(learned, np.s_[::2], 0)))
    wanted = {
        "frechet_distance": fidelity.frechet_distance(floor, apart),
        "kernel_distance": fidelity.kernel_distance(floor, apart).value,
        "precision": fidelity.precision_recall(floor, apart)[0],
        "recall": fidelity.precision_recall(floor, apart)[1],
        "density": fidelity.density_coverage(floor, apart)[0],
        "coverage": fidelity.density_coverage(floor, apart)[1],
    }
    rows = measures.compare(drawn, real, extractor, evaluate.METRICS, tmp_path)
    assert {row["measure"]: row["floor"] for row in rows} == pytest.approx(wanted)
    shifts = {row["measure"]: row["floor"] for row in measures.shifts(drawn, real)}
    (shift,) = fidelity.channel_shift(learned[::2], np.delete(learned, np.s_[::2], 0))
    assert shifts == pytest.approx({"mean_shift": shift.mean.value, "std_ratio": shift.std_ratio.value})


@pytest.mark.parametrize(("module", "metrics"), [("matplotlib", ["kernel"]), ("torchdiffeq", ["kernel", "flow"])])
def test_what_is_not_installed_is_named_before_anything_is_sampled(run, monkeypatch, module, metrics):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None if name == module else name)
    given = evaluate.parser().parse_args([str(run), "--metrics", ",".join(metrics)])
    with pytest.raises(ValueError, match=f"{module} is not installed: pip install"):
        evaluate.check(given)
