"""Comparing samplers by their network calls, on Gaussian images, for which a perfect network is known."""

import copy
import dataclasses
import inspect
import json
import math
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from benchmarks import few_steps
from ddpm_pipeline import DDPMScheduler
from ddpm_pipeline.calibrated import save_tables
from ddpm_pipeline.features import extract_features, make_extractor
from ddpm_pipeline.fidelity import Estimate, frechet_distance, jackknife, kernel_distance
from ddpm_pipeline.pixels import to_pixels
from ddpm_pipeline.solver_tables import dpm_solver_table
from tests.arrays import normal
from tests.evaluation.helpers import data_split
from tests.gaussian import MEAN, STD, gaussian_pipe
from tests.short_run import fresh_accelerate, run_in_child
from training.calibration import settings
from training.calibration.compare import (
    FeatureDistances,
    Record,
    Samples,
    TeacherDistance,
    best_built_in,
    best_settings,
    compare,
    draw,
    load_records,
    plot,
    ratio,
    save_records,
    table,
)
from training.calibration.settings import CALIBRATED, DDIM, DDPM, SETTINGS, make_plan, num_calls
from training.evaluation.measures import Result
from training.evaluation.reference import choose_real_images
from training.evaluation.samples import Model
from training.run.runtime import Runtime, leave_process_group

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROOT = Path(__file__).resolve().parents[1]
SAMPLES = Samples(6, seed=10, batch_size=4)
BY_NAME = {setting.name: setting for setting in SETTINGS}
TABLE_TIMES = "DPM-Solver++ 2M at the table's timesteps"


@pytest.fixture
def runtime():
    with fresh_accelerate():
        yield Runtime("no", cpu_threads=1)


def gaussian_model(prediction_type="epsilon", sha256="0" * 64):
    """A perfect network for Gaussian images, in float32."""
    return Model(gaussian_pipe(prediction_type, dtype=torch.float32), "EMA", sha256, "1" * 64, None)


def noise(samples=SAMPLES):
    """What the pipeline draws for these seeds."""
    generators = [torch.Generator().manual_seed(samples.seed + i) for i in range(samples.number)]
    return torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])


def exact_images(scheduler, samples=SAMPLES):
    """The solution of the probability-flow ODE from x_T: it keeps the distance from the mean in standard deviations."""
    alpha_bar = scheduler.alphas_cumprod[-1].double()
    mean, variance = alpha_bar.sqrt() * MEAN, alpha_bar * STD**2 + 1 - alpha_bar
    return MEAN + STD * (noise(samples) - mean) / variance.sqrt()


def exact_distance(model):
    return TeacherDistance(exact_images(model.pipe.scheduler), "the exact solution")


def compare_here(tmp_path, runtime, chosen, calls=(5,), model=None, measure=None, samples=SAMPLES, **options):
    model = model or gaussian_model()
    measure = measure or exact_distance(model)
    path = tmp_path / "records.json"
    return [
        record
        for number in calls
        for record in compare(model, number, chosen, measure, samples, path=path, runtime=runtime, **options)
    ]


def value(record):
    (result,) = record.results
    return result.estimate.value


# ---- Settings --------------------------------------------------------------------------------------------------------


def test_every_option_exists_and_every_name_is_used_once():
    """from_config ignores an option that the class does not have."""
    assert len(BY_NAME) == len(SETTINGS) > 80
    for setting in SETTINGS:
        name = setting.scheduler or "DDPMScheduler"
        assert set(setting.options) <= set(inspect.signature(getattr(diffusers, name).__init__).parameters), setting
    assert len({json.dumps([s.scheduler, s.options, s.call, s.at_table], sort_keys=True) for s in SETTINGS}) == len(
        SETTINGS
    )


@pytest.mark.filterwarnings("ignore:timestep_spacing")
def test_every_setting_samples_gaussian_images(runtime):
    """20 calls come near the right distribution, with beta sigmas, coarse at the end, and SA-Solver only roughly."""
    model = gaussian_model()
    for setting in SETTINGS:
        if setting.at_table:
            continue
        plan = make_plan(setting, model.pipe.scheduler, 20)
        images = draw(model.pipe, plan.scheduler, plan.call, SAMPLES, runtime)
        is_coarse = "beta" in setting.name or setting.name.startswith("SA-Solver")
        assert images.mean() == pytest.approx(MEAN, abs=0.1 if is_coarse else 0.03), setting.name
        assert images.std() == pytest.approx(STD, rel=2 if is_coarse else 0.5), setting.name


@pytest.mark.parametrize(
    ("name", "calls", "steps", "made"),
    [("DDIM", 6, 6, 6), ("Heun", 6, 3, 5), ("Heun", 7, 4, 7), ("KDPM2", 6, 3, 5), ("PNDM", 6, 5, 6)],
)
def test_calls_are_those_of_the_network(name, calls, steps, made, runtime):
    model = gaussian_model()
    plan = make_plan(BY_NAME[name], model.pipe.scheduler, calls)
    assert (plan.call["num_inference_steps"], plan.num_calls) == (steps, made)
    draw(model.pipe, plan.scheduler, plan.call, Samples(2, seed=0), runtime)
    assert model.pipe.unet.calls == made


def test_a_setting_has_the_noise_schedule_of_the_model():
    """from_config leaves out betas at the default of DDPM, and the default of Heun is another."""
    scheduler = gaussian_model().pipe.scheduler
    for name in ("Heun", "DPM-Solver++ 2M"):
        made = make_plan(BY_NAME[name], scheduler, 5).scheduler
        torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod)


def test_guided_steps_are_two_calls():
    assert num_calls([900, 500, 100], {}) == 3
    assert num_calls([900, 500, 100], {"guidance_scale": 2.0}) == 6
    assert num_calls([900, 500, 100], {"autoguidance_scale": 2.0, "guidance_interval": (100, 500)}) == 4
    assert num_calls([900, 500, 100], {"guidance_scale": 1.0, "guidance_interval": (100, 500)}) == 3
    guided = dataclasses.replace(DDIM, call={"autoguidance_scale": 2.0})
    assert make_plan(guided, gaussian_model().pipe.scheduler, 9).call["num_inference_steps"] == 4


def test_deis_and_sa_solver_repeat_the_last_sigma():
    scheduler = gaussian_model().pipe.scheduler
    for name in ("DEIS 2", "SA-Solver"):
        for options in (settings.KARRAS, settings.EXPONENTIAL, settings.BETA):
            changed = dataclasses.replace(BY_NAME[name], options={**settings.TRAILING, **options})
            sigmas = make_plan(changed, scheduler, 5).scheduler.sigmas
            assert sigmas[-1] == sigmas[-2]
        sigmas = make_plan(BY_NAME[name], scheduler, 5).scheduler.sigmas
        assert 0 < sigmas[-1] < sigmas[-2] / 10


@pytest.mark.filterwarnings("ignore:some pixels are non-finite")
def test_unipc_bh1_to_sigma_0_is_nan(runtime):
    model = gaussian_model()
    changed = dataclasses.replace(BY_NAME["UniPC 2, bh1"], options={**settings.TRAILING, "solver_type": "bh1"})
    for setting, is_finite in ((changed, False), (BY_NAME["UniPC 2, bh1"], True)):
        plan = make_plan(setting, model.pipe.scheduler, 5)
        assert draw(model.pipe, plan.scheduler, plan.call, SAMPLES, runtime).isfinite().all() == is_finite


# ---- Comparing -------------------------------------------------------------------------------------------------------


def test_more_calls_come_nearer_to_the_exact_solution(tmp_path, runtime):
    """DDIM is of first order, DPM-Solver++ 2M of second."""
    records = compare_here(tmp_path, runtime, [DDIM, BY_NAME["DPM-Solver++ 2M"]], calls=(10, 20, 40))
    ddim, second = ([value(r) for r in records if r.setting == name] for name in ("DDIM", "DPM-Solver++ 2M"))
    assert 1.7 < ddim[0] / ddim[1] < 2.3 and 1.7 < ddim[1] / ddim[2] < 2.3
    assert second[0] / second[1] > 2.3 and second[1] / second[2] > 3.5
    assert [record.calls for record in records] == [10, 10, 20, 20, 40, 40]
    assert best_built_in(records, "teacher_distance", 20).setting == "DPM-Solver++ 2M"


def test_an_image_is_that_of_its_seed(runtime):
    model = gaussian_model()
    plan = make_plan(DDIM, model.pipe.scheduler, 5)
    images = draw(model.pipe, plan.scheduler, plan.call, SAMPLES, runtime)
    model.pipe.scheduler = diffusers.DDIMScheduler.from_config(model.pipe.scheduler.config, timestep_spacing="trailing")
    expected = model.pipe(seeds=[10, 11, 12, 13, 14, 15], num_inference_steps=5, output_type="latent").images
    torch.testing.assert_close(images, expected)


def test_the_pipeline_keeps_its_scheduler(tmp_path, runtime):
    model = gaussian_model()
    scheduler, config = model.pipe.scheduler, dict(model.pipe.scheduler.config)
    compare_here(tmp_path, runtime, [DDIM, DDPM, BY_NAME["Heun"]], model=model)
    assert model.pipe.scheduler is scheduler and dict(scheduler.config) == config
    assert model.pipe.config["scheduler"][1] == "DDPMScheduler"


def test_what_was_drawn_is_not_drawn_again(tmp_path, runtime):
    model, chosen = gaussian_model(), [DDIM, BY_NAME["Euler"]]
    first = compare_here(tmp_path, runtime, chosen, model=model)
    made = model.pipe.unet.calls
    assert compare_here(tmp_path, runtime, chosen, model=model) == first
    assert model.pipe.unet.calls == made == 20
    more = compare_here(tmp_path, runtime, chosen, calls=(5, 3), model=model)
    assert more[:2] == first and model.pipe.unet.calls == made + 12
    assert compare_here(tmp_path, runtime, chosen, model=model) == first


def test_whatever_changes_the_results_is_drawn_again(tmp_path, runtime):
    model, measure = gaussian_model(), exact_distance(gaussian_model())
    compare_here(tmp_path, runtime, [DDIM], model=model, measure=measure)
    renamed = TeacherDistance(exact_images(model.pipe.scheduler), "another")
    for changes in (
        {"chosen": [dataclasses.replace(DDIM, options={"timestep_spacing": "linspace"})]},
        {"chosen": [dataclasses.replace(DDIM, call={"eta": 0.5})]},
        {"samples": dataclasses.replace(SAMPLES, seed=11)},
        {"measure": renamed},
        {"model": model._replace(sha256="2" * 64)},
        {"model": model._replace(scheduler_hash="2" * 64)},
    ):
        before = model.pipe.unet.calls
        arguments = {"chosen": [DDIM], "model": model, "measure": measure} | changes
        compare_here(tmp_path, runtime, **arguments)
        assert model.pipe.unet.calls > before, changes


def test_a_file_of_something_else_is_refused(tmp_path, runtime):
    (tmp_path / "records.json").write_text('{"measurements": []}')
    with pytest.raises(ValueError, match=r"records\.json has no records of a comparison .*remove it, or give another"):
        compare_here(tmp_path, runtime, [DDIM])


def test_skipped_settings_say_why(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_discrete.is_scipy_available", lambda: False)
    chosen = [BY_NAME["KDPM2"], BY_NAME["Euler, beta"], BY_NAME[TABLE_TIMES], DDIM]
    model = gaussian_model("sample")
    kdpm2, beta, at_table, ddim = compare_here(tmp_path, runtime, chosen, model=model)
    assert "KDPM2DiscreteScheduler cannot sample from this model" in kdpm2.problem
    assert "scipy" in beta.problem and "there is no calibrated table" in at_table.problem
    assert [r.num_calls for r in (kdpm2, beta, at_table, ddim)] == [0, 0, 0, 5] and ddim.problem is None
    text = "\n".join(table([kdpm2, beta, at_table, ddim]))
    assert f"- KDPM2 (5): {kdpm2.problem}" in text
    monkeypatch.undo()
    assert compare_here(tmp_path, runtime, chosen, model=model)[1].problem is None


def test_non_finite_samples_have_no_distance(tmp_path, runtime):
    model = gaussian_model()
    forward = model.pipe.unet.forward
    model.pipe.unet.forward = lambda *args, **options: (forward(*args, **options)[0] * math.inf,)
    (record,) = compare_here(tmp_path, runtime, [DDIM], model=model)
    assert record.problem == "6 of 6 samples are non-finite" and record.results == []
    model.pipe.unet.forward = forward
    assert compare_here(tmp_path, runtime, [DDIM], model=model) == [record]  # these weights always give them
    assert "- DDIM (5): 6 of 6 samples are non-finite" in table([record])


def test_settings_at_the_timesteps_of_a_table(tmp_path, runtime):
    model, times = gaussian_model(), [999, 700, 450, 200, 50]
    scheduler = model.pipe.scheduler
    fitted, other = (dpm_solver_table(scheduler, each) for each in (times, [999, 701, 450, 200, 50]))
    save_tables(scheduler, model.pipe.unet, [fitted])
    own = make_plan(CALIBRATED, scheduler, 5, fitted)
    assert own.call == {"num_inference_steps": 5, "calibrated": True} and own.num_calls == 5
    setting = BY_NAME[TABLE_TIMES]
    assert make_plan(setting, scheduler, 5, fitted).call == {"timesteps": times}
    (record,) = compare_here(tmp_path, runtime, [setting], model=model, fitted=fitted)
    assert record.num_calls == 5 and record.inputs["table"]["timesteps"] == times
    before = model.pipe.unet.calls
    assert compare_here(tmp_path, runtime, [setting], model=model, fitted=other)[0].results != record.results
    assert model.pipe.unet.calls == before + 10


def test_another_guide_is_measured_anew(tmp_path, runtime):
    """Where it has a part; other settings are not drawn again."""
    model = gaussian_model()
    guided = dataclasses.replace(DDIM, name="guided", call={"autoguidance_scale": 2.0})
    model.pipe.guide = copy.deepcopy(model.pipe.unet)
    first = compare_here(tmp_path, runtime, [guided, DDIM], model=model)
    with torch.no_grad():
        model.pipe.guide.conv_in.weight += 1
    second = compare_here(tmp_path, runtime, [guided, DDIM], model=model)
    assert first[0].key != second[0].key and first[1] == second[1]
    assert model.pipe.unet.calls == 2 * 4 + 10  # two batches: two guided steps each time, and five others once


def test_faults_of_a_scheduler_of_diffusers_leave_it_out(tmp_path, runtime):
    """With the cosine schedule, two of these timesteps are equal after rounding, and it looks for a step too many."""
    model = gaussian_model()
    model.pipe.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    karras, ddim = compare_here(tmp_path, runtime, [BY_NAME["DPM-Solver++ 2M, Karras"], DDIM], model=model)
    assert karras.problem.startswith("IndexError") and ddim.problem is None
    model.pipe.unet.forward = None  # of our own sampler, an error is one
    table_ = dpm_solver_table(model.pipe.scheduler, [999, 500])
    save_tables(model.pipe.scheduler, model.pipe.unet, [table_])
    with pytest.raises(TypeError):
        compare_here(tmp_path, runtime, [CALIBRATED], calls=(2,), model=model, fitted=table_)


def test_two_processes_give_the_records_of_one(tmp_path, runtime):
    alone = compare_of_processes(tmp_path / "one.json", runtime)
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "tests.test_calibration_compare",
    ]
    run_in_child(launcher, None, [str(tmp_path / "two.json")], cwd=ROOT)
    together = load_records(tmp_path / "two.json")
    assert [dataclasses.replace(record, seconds=0.0) for record in together] == [
        dataclasses.replace(record, seconds=0.0) for record in alone
    ]
    assert [record.num_calls for record in alone] == [5, 5, 0]


def compare_of_processes(path, runtime):
    """A sampler with noise, and one that cannot sample from this model, so that the ranks must agree to skip it."""
    model = gaussian_model("sample")
    chosen = [DDPM, BY_NAME["SDE-DPM-Solver++ 2M"], BY_NAME["KDPM2"]]
    return compare(model, 5, chosen, exact_distance(model), SAMPLES, path=path, runtime=runtime)


# ---- Measures --------------------------------------------------------------------------------------------------------


def test_the_standard_error_of_the_distance_to_the_teacher():
    """That of the jackknife which leaves out one image at a time."""
    images, samples = normal(400, 1, 4, 4, seed=0) * 0.3, normal(400, 1, 4, 4, seed=1) * 0.3
    (result,) = TeacherDistance(images, "teacher")(samples)
    expected = jackknife(lambda x, y: (x - y[: len(x)]).square().mean().sqrt().item(), (samples - images).flatten(1),
                         torch.zeros(400, 16), groups=400)  # fmt: skip
    assert result.estimate == pytest.approx(expected, rel=0.01)
    (same,) = TeacherDistance(images * 10, "teacher")(images.clamp(-0.1, 0.1) * 0 + (images * 10).clamp(-1, 1) * 3)
    assert same.estimate.value == pytest.approx(0, abs=1) and same.n == 400


def test_feature_distances_are_those_of_an_evaluation(tmp_path):
    pixels = to_pixels(normal(60, 1, 4, 4, seed=2) * 0.3)
    real = choose_real_images(data_split(pixels, pixels[:20]), 40, 20)
    extractor = make_extractor("pixels", images=pixels)
    samples = normal(20, 1, 4, 4, seed=3) * 0.3
    frechet, kernel = FeatureDistances(real, extractor, tmp_path)(samples)
    features, reference = (extract_features(extractor, each) for each in (to_pixels(samples), real.reference))
    assert frechet.estimate == jackknife(frechet_distance, features, reference)
    assert kernel.estimate == kernel_distance(features, reference)
    assert (frechet.measure, kernel.measure) == ("frechet_distance", "kernel_distance") and frechet.n == 20
    assert frechet.real_data_baseline == frechet_distance(extract_features(extractor, pixels[:20]), reference)


# ---- Table and plot --------------------------------------------------------------------------------------------------


def record_of(setting, calls, value, error=0.1, num_calls=None, is_calibrated=False):
    results = [Result("frechet_distance", "Frechet distance", Estimate(value, error), 64, 0.5, "pixels")]
    results.append(Result("kernel_distance", "kernel distance", Estimate(value - 2, error), 64, 0.0, "pixels"))
    return Record(setting, is_calibrated, calls, num_calls or calls, {}, results, None, 1.0)


RECORDS = [
    record_of("DDIM", 5, 8.0), record_of("DDPM", 5, 9.0), record_of("Heun", 5, 4.0), record_of("Euler", 5, 6.0),
    record_of("calibrated", 5, 3.0, is_calibrated=True),
    record_of("DDIM", 10, 5.0), record_of("DDPM", 10, 6.0), record_of("Heun", 10, 4.5, num_calls=9),
    record_of("Euler", 10, 2.0), record_of("calibrated", 10, 1.5, is_calibrated=True),
]  # fmt: skip


def test_the_best_settings_are_measured_further():
    """With DDIM and DDPM, and of a setting and itself clipped the better one."""
    values = {"UniPC 3, bh1": 2.0, "UniPC 3, bh1, clipped": 1.9, "UniPC 2, bh1": 3.0, "UniPC 2, bh1, clipped": 3.1}
    values |= {"DDIM": 9.0, "DDPM": 8.0, "Euler": 4.0, "Heun": 5.0}
    records = [record_of(name, 5, value) for name, value in values.items()]

    def names(number):
        return {setting.name for setting in best_settings(SETTINGS, records, number)}

    assert names(3) == {"UniPC 3, bh1, clipped", "UniPC 2, bh1", "Euler", "DDIM", "DDPM"}
    assert names(100) == {"UniPC 3, bh1, clipped", "UniPC 2, bh1", "Euler", "Heun", "DDIM", "DDPM"}


def test_the_table_has_the_best_setting_and_its_ratio():
    lines = table(RECORDS)
    assert lines[:5] == [
        "## Frechet distance, features of the pixels, 64 samples",
        "",
        "| calls | best built-in | its setting | DDIM | DDPM | calibrated | calibrated / best built-in |",
        "|---|---|---|---|---|---|---|",
        "| 5 | 4 &plusmn; 0.1 | Heun | 8 &plusmn; 0.1 | 9 &plusmn; 0.1 | 3 &plusmn; 0.1 | 0.75 &plusmn; 0.031 |",
    ]
    assert "| 10 | 2 &plusmn; 0.1 | Euler |" in lines[5] and "Real-data baseline: 0.5." in lines
    assert "| Heun | 4 &plusmn; 0.1 | 4.5 &plusmn; 0.1 (9 calls) |" in lines
    of_kernel = lines[lines.index("## Kernel distance, features of the pixels, 64 samples") :]
    assert of_kernel[5].endswith("| -0.5 &plusmn; 0.1 |  |")  # a ratio to 0 means nothing


def test_the_standard_error_of_a_ratio():
    """That of simulated values."""
    a, b = 3 + 0.05 * normal(100_000, seed=0), 4 + 0.08 * normal(100_000, seed=1)
    estimate = ratio(Estimate(3.0, 0.05), Estimate(4.0, 0.08))
    assert estimate == pytest.approx(((a / b).mean().item(), (a / b).std().item()), rel=0.02)
    assert ratio(Estimate(3.0, 0.05), Estimate(-1.0, 0.08)) is None


def test_the_benchmark_takes_the_records_with_the_most_samples(tmp_path, capsys, monkeypatch):
    def saved(record, num_samples, **call):
        inputs = {"num_samples": num_samples, "setting": {"call": call, "options": {}}}
        return dataclasses.replace(record, inputs=inputs)

    records = [saved(record, 64) for record in RECORDS]
    records.append(saved(record_of("Euler", 5, 1.0), 32))  # of the screening
    records.append(saved(record_of("calibrated", 10, 1.2, is_calibrated=True), 64, autoguidance_scale=2.0))
    (tmp_path / "runs" / "calibration").mkdir(parents=True)
    save_records(tmp_path / "runs" / "calibration" / "comparison.json", records)
    monkeypatch.setattr(few_steps, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["few_steps.py", str(tmp_path / "runs"), "--name", "test"])
    few_steps.main()
    lines = capsys.readouterr().out.splitlines()
    assert (
        "| 5 | 4 &plusmn; 0.1 | 8 &plusmn; 0.1 | 9 &plusmn; 0.1 | 3 &plusmn; 0.1 |  | Heun | 0.75 &plusmn; 0.03 |"
        in lines
    )
    assert lines[5].startswith("| 10 | 2 &plusmn; 0.1 |") and lines[5].endswith(
        "| 1.5 &plusmn; 0.1 | 1.2 &plusmn; 0.1 | Euler | 0.60 &plusmn; 0.06 |"
    )
    saved_row = json.loads((tmp_path / "few-steps-test.json").read_text())["models"]["runs"][1]
    assert saved_row["calibrated, guided"]["call"] == {"autoguidance_scale": 2.0}
    assert Image.open(tmp_path / "few-steps-test.png").size[0] > 400


@pytest.mark.parametrize("calls", [{5, 10}, {5}])
def test_the_plot_is_written(calls, tmp_path):
    plot([record for record in RECORDS if record.calls in calls], tmp_path / "compare.png")
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > height > 400  # a panel for each of the two measures


if __name__ == "__main__":
    compare_of_processes(Path(sys.argv[1]), Runtime("no", cpu_threads=1))
    leave_process_group()
