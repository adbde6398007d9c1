"""The settings of an evaluation: defaults, what is refused, and how the command line fills them in."""

import pytest

from training.evaluation import config as config_module
from training.evaluation.config import METRICS, EvalConfig, check_installed, parse


def test_defaults():
    config = EvalConfig("runs/x")
    assert config.metrics == ("frechet", "kernel", "precision", "density", "memorisation", "shift", "accuracy", "bound")
    assert (config.num_inference_steps, config.eta, config.weights) == ((50,), (), ("ema", "online"))
    assert config.extractor == ("classifier",) and config.output_dir is None
    assert (config.guidance_scales, config.guidance_interval) == ((1.0,), None)
    assert config == parse(["runs/x"])


def test_lists_are_separated_by_commas_and_the_extractor_may_be_repeated():
    config = parse(
        ["runs/x", "--num_inference_steps", "50,10", "--eta=1,0.5", "--weights=ema", "--metrics", "bound, flow",
         "--extractor", "pixels", "--extractor=a/b.pt", "--num_samples=64"]
    )  # fmt: skip
    assert parse(["runs/x", "--guidance_scales=1,1.5", "--guidance_interval", "100,600"]) == EvalConfig(
        "runs/x", guidance_scales=(1.0, 1.5), guidance_interval=(100.0, 600.0)
    )
    assert config == EvalConfig(
        "runs/x", num_inference_steps=(50, 10), eta=(1.0, 0.5), weights=("ema",), metrics=("bound", "flow"),
        extractor=("pixels", "a/b.pt"), num_samples=64,
    )  # fmt: skip


def test_metrics_by_what_they_need():
    config = EvalConfig("runs/x", metrics=("flow", "shift", "kernel", "bound"))
    assert config.sample_metrics == ["shift", "kernel"] and config.feature_metrics == ["kernel"]
    assert config.held_out_metrics == ["flow", "bound"]
    assert set(METRICS) == {*EvalConfig("x").metrics, "flow"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_samples", 15, "num_samples is 15: give at least 16"),
        ("num_reference", -1, "num_reference is -1: give at least 0"),
        ("num_reference", 3, "num_reference is 3: give at least 16, or 0 for all"),
        ("num_bound_images", 1, "num_bound_images is 1: give at least 2"),
        ("num_flow_images", 1, "num_flow_images is 1: give at least 2"),
        ("strata", -1, "strata is -1: give at least 0"),
        ("strata", 7, "strata is 7: give at least 8"),
        ("batch_size", 0, "batch_size is 0: give at least 1"),
        ("seed", -1, "seed is -1: give at least 0"),
        ("seed", 2**32, f"seed is {2**32}: give at most {2**32 - 64 - 2048}"),
        ("cpu_threads", 0, "cpu_threads is 0: give at least 1"),
        ("metrics", "frechet,fid", "metrics has 'fid': give some of frechet,kernel,"),
        ("metrics", "", "metrics has ''"),
        ("metrics", "bound,bound", "metrics is bound,bound: give each value once"),
        ("weights", "best", "weights has 'best': give some of ema,online"),
        ("eta", "0,1.5", "eta has 1.5: give numbers from 0 to 1"),
        ("eta", "nan", "eta is 'nan'"),
        ("guidance_scales", "1,high", "guidance_scales is"),
        ("guidance_scales", "", "guidance_scales is"),
        ("guidance_scales", "2,2", "guidance_scales is 2.0,2.0: give each value once"),
        ("guidance_interval", "100", "guidance_interval is"),
        ("guidance_interval", "100,600", "guidance_interval is 100.0,600.0, but guidance_scales is 1, no guidance"),
        ("autoguidance", "true", "autoguidance is true, but guidance_scales is 1, no guidance: give other scales too"),
        ("num_inference_steps", "10,0", "num_inference_steps has 0: give at least 1"),
        ("num_inference_steps", "10,10", "num_inference_steps is 10,10: give each value once"),
        ("train_data_dir", "x --dataset_name=moons", "dataset_name is 'moons' and train_data_dir is 'x': give one"),
        ("num_samples", "many", "num_samples is 'many'"),
        ("eta", "0;1", "eta is '0;1'"),
        ("num_inference_steps", "1.5", "num_inference_steps is '1.5'"),
        ("mixed_precision", "half", "mixed_precision is 'half'"),
        ("samples", "5", "--samples"),
    ],
)
def test_a_bad_flag_exits_with_2_and_names_its_value(capsys, name, value, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(["runs/x", *f"--{name}={value}".split(" ")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": (float("nan"),)}, "eta has nan: give numbers from 0 to 1"),
        ({"guidance_scales": (1.0, float("inf"))}, "guidance_scales has inf: give finite numbers"),
        ({"extractor": ()}, "extractor is empty: give at least one value"),
        ({"num_samples": 3}, "num_samples is 3: give at least 16"),
    ],
)
def test_bad_settings_raise_from_python_too(settings, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig("runs/x", **settings)


def test_the_model_is_required(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse([])
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "metrics"), [("matplotlib", ("kernel",)), ("torchdiffeq", ("kernel", "flow"))])
def test_a_missing_library_is_named(monkeypatch, module, metrics):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(ValueError, match=f"{module} is not installed: pip install"):
        check_installed(EvalConfig("runs/x", metrics=metrics))
