"""The benchmarks' own tools: ratios, timing with a fake clock, recorded steps of a script, stand-in transforms."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench, compare, levers, peers, sampler, sampling, scripts, trace
from benchmarks.clock import Timing, run_script
from benchmarks.compare import Comparison, Measurement, alternate
from benchmarks.networks import HEADS_OF_8, count_flop
from benchmarks.stand_in.torchvision import transforms
from training.config import parse
from training.denoiser import find_network, make_denoiser, network_of


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    # The ratio of the medians, 2 and 2, would be 1.
    times = Comparison("", "ms", peer=[1.0, 2.0, 30.0], ours=[0.25, 2.0, 3.0], target=4.0)
    assert times.ratios == [4.0, 1.0, 10.0]
    result = times.as_dict()
    assert result["ratio"] == 4.0 and result["target_met"] and result["rounds"] == 3
    assert result["peer"] == result["ours"] == 2.0
    assert result["ratio_quantiles_10_90"] == [1.6, 8.8]
    rates = Comparison("", "images/s", peer=[10.0], ours=[15.0], target=1.7)
    assert rates.ratio == 1.5 and not rates.as_dict()["target_met"]


def test_operations_per_second_of_a_rate_and_of_a_time():
    rates = Comparison("", "images/s", peer=[10.0], ours=[20.0], flop=3e9).as_dict()
    assert (rates["peer_gflops"], rates["ours_gflops"]) == (30, 60)
    times = Comparison("", "ms", peer=[200.0], ours=[100.0], flop=3e9).as_dict()
    assert (times["peer_gflops"], times["ours_gflops"]) == (15, 30)
    shares = bench.with_shares(times, {"matrix_product": 100.0, "convolution": 40.0})
    assert (shares["ours_share_of_matrix_product"], shares["ours_share_of_convolution"]) == (0.3, 0.75)
    assert "peer 200 ms, ours 100: 2 times" in bench.describe(shares | {"name": "a"})
    for target, met in ((0.75, True), (0.8, False)):
        alone = Measurement("a", "images/s", ours=[10.0], flop=3e9, target=target).as_dict()
        alone = bench.with_shares(alone, {"matrix_product": 100.0, "convolution": 40.0})
        assert alone["target_met"] is met
        assert f"75% of the convolution's), target {target:g}: {'met' if met else 'MISSED'}" in bench.describe(alone)


def test_operations_of_the_networks():
    # 9 and 37 GFLOP, as Ho et al.'s network and the like are known by.
    assert [round(count_flop(name, backward=True) / 1e9, 1) for name in ("tiny", HEADS_OF_8, "ddpm-cifar10")] == [
        0.7,
        9.5,
        37.3,
    ]
    for name in ("tiny", "ddpm-cifar10"):
        ratio = count_flop(name, backward=True) / count_flop(name)
        assert 2.9 < ratio < 3  # nothing asks for the gradient of the images


@pytest.mark.parametrize(("peer", "ours", "unit"), [(0.03, 0.01, "ms"), (6e-5, 2e-5, "us")])
def test_peer_and_ours_are_timed_in_alternation(monkeypatch, peer, ours, unit):
    clock, calls = [0.0], []

    def takes(seconds, who):
        def call():
            clock[0] += seconds
            calls.append(who)

        return call

    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    result = alternate("", takes(peer, "peer"), takes(ours, "ours"), seconds=1)
    assert result.ratio == pytest.approx(3) and result.unit == unit
    assert result.peer == pytest.approx([peer * {"ms": 1e3, "us": 1e6}[unit]] * len(result.peer))
    assert len(result.peer) == len(result.ours) > 20 and clock[0] < 1.2
    blocks = [who for who, previous in zip(calls, ["", *calls]) if who != previous]
    assert blocks.count("peer") > 10 and blocks.count("ours") > 10


def test_clock_ends_a_script_after_the_last_timed_step(tmp_path):
    script, file = tmp_path / "script.py", tmp_path / "times.json"
    script.write_text(
        "import sys, time, torch\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])\n"
        "for step in range(1, 9):\n"
        "    time.sleep(0.05)\n"
        "    print(step, __name__, *sys.argv[1:], flush=True)\n"
        "    optimizer.step()\n"
    )
    clock = Path(compare.__file__).with_name("clock.py")
    for steps, seconds, last in ((3, 60, 5), (100, 0.07, 4)):  # 3 steps, or the steps that begin within 0.07 s
        timing = json.dumps({"warm_up": 2, "steps": steps, "seconds": seconds})
        command = [sys.executable, clock, file, timing, script, "--a", "b"]
        process = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        lines = process.stdout.splitlines()
        assert lines[0] == "1 __main__ --a b"
        times = json.loads(file.read_text())
        if steps == 3:  # when the other one ends depends on the load of the machine
            assert len(lines) == last
        assert len(lines) == 2 + times["steps"] < 8
        assert times["begin"] >= times["first"] + 0.05 and times["end"] >= times["begin"] + 0.05 * times["steps"]


def test_a_script_is_timed_in_this_process_after_a_warm_up_in_seconds(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, torch\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])\n"
        "for step in range(1, int(sys.argv[1])):\n"
        "    time.sleep(0.02)\n"
        "    print(step, __name__, flush=True)\n"
        "    optimizer.step()\n"
    )
    argv, path = list(sys.argv), list(sys.path)
    timing, began = Timing(warm_up=1, steps=3, seconds=60, warm_up_seconds=0.1), []
    times = run_script(script, [1000], timing, on_begin=lambda: began.append(1))
    assert times["steps"] == 3 and began == [1]
    assert times["begin"] >= times["first"] + 0.1 and times["end"] >= times["begin"] + 0.06
    assert capsys.readouterr().out.startswith("1 __main__\n")
    with pytest.raises(RuntimeError, match=r"script\.py ended before its last timed step"):
        run_script(script, [3], timing)
    assert (sys.argv, sys.path) == (argv, path)


def test_ours_and_the_peer_sample_the_same_images(tmp_path):
    """Times of other images would not be comparable. In bf16 the images differ by rounding."""
    torch.manual_seed(0)
    pipeline = sampling.save_pipeline(tmp_path, "tiny")
    for precision, tolerance in (("no", 1e-3), ("bf16", 0.05)):
        ours = sampler.make_sampler("ours", pipeline, precision, 2, 2)("")
        assert ours.shape == (2, 32, 32, 3) and ours.std() > 0.1
        peer = sampler.make_sampler("peer", pipeline, precision, 2, 2)
        for variant in sampler.VARIANTS[precision]:
            assert abs(peer(variant) - ours).mean() < tolerance, variant


def test_a_process_that_samples_answers_each_request(tmp_path):
    pipeline = sampling.save_pipeline(tmp_path, "tiny")
    with sampling.sampler_process("peer", pipeline, "bf16", 1, 1) as process:
        assert all(0 < sampling.ask(process, variant) < 60 for variant in ("weights", "autocast"))
        with pytest.raises(RuntimeError, match="KeyError"):
            sampling.ask(process, "float16")


def test_stand_in_transforms_equal_their_definitions():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    image = Image.fromarray(pixels)
    torch.testing.assert_close(to_tensor(image), expected)
    torch.testing.assert_close(to_tensor(transforms.CenterCrop(32)(image)), expected[:, 4:36, 9:41])
    cropped = to_tensor(transforms.RandomCrop(32)(image))
    windows = expected.unfold(1, 32, 1).unfold(2, 32, 1)
    assert ((windows - cropped[:, None, None]).abs().amax((0, 3, 4)) < 1e-6).sum() == 1
    torch.testing.assert_close(to_tensor(transforms.CenterCrop((32, 20))(image)), expected[:, 4:36, 15:35])
    assert transforms.Resize(20)(image).size == (25, 20)
    assert transforms.Resize((10, 30))(image).size == (30, 10)
    torch.testing.assert_close(
        transforms.ConvertImageDtype(torch.float32)(transforms.PILToTensor()(image)), transforms.ToTensor()(image)
    )


def event(name, category, begin, end, thread=1):
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": end - begin, "tid": thread}


def test_a_trace_tells_gaps_kernels_and_waits(tmp_path):
    """Two steps: 400 us on the GPU, of which 100 us idle; the host waits twice in them, and once after them."""
    events = [
        event("steps", "user_annotation", 1000, 1300),
        event("steps", "gpu_user_annotation", 1050, 1450),
        event("cudaStreamSynchronize", "cuda_runtime", 1100, 1110),
        event("cudaDeviceSynchronize", "cuda_runtime", 1200, 1210),
        event("cudaDeviceSynchronize", "cuda_runtime", 1310, 1450),  # ours, after the steps
        event("cudaLaunchKernel", "cuda_runtime", 1010, 1020),
        event("cuLaunchKernelEx", "cuda_driver", 1020, 1030),
        event("aten::_local_scalar_dense", "cpu_op", 1100, 1110),
        event("convolution", "kernel", 1050, 1150),
        event("norm", "kernel", 1100, 1200, thread=2),  # beside the convolution
        event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 1200, 1210),
        event("convolution", "kernel", 1310, 1450),
        event("from before", "kernel", 900, 1000),
        {"ph": "i", "name": "marker"},
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    result = trace.analyse(file, "steps", num_steps=2)
    assert (result["milliseconds"], result["milliseconds_on_gpu"], result["share_in_gaps"]) == (0.15, 0.2, 0.25)
    assert (result["waits_of_the_host"], result["items"], result["copies_to_host"], result["launches"]) == (
        1,
        0.5,
        0.5,
        1,
    )
    assert result["kernels"][0] == {"name": "convolution", "milliseconds": 0.12, "share": 0.6857, "calls": 1}
    assert [kernel["name"] for kernel in result["kernels"]] == [
        "convolution", "norm", "Memcpy DtoH (Device -> Pageable)",
    ]  # fmt: skip


def test_the_trace_of_a_cpu_has_the_operations_by_the_time_of_their_own(tmp_path):
    events = [
        event("steps", "user_annotation", 0, 100),
        event("aten::outer", "cpu_op", 0, 60),
        event("aten::inner", "cpu_op", 10, 30),
        event("aten::inner", "cpu_op", 30, 50),
        event("aten::inner", "cpu_op", 5, 15, thread=2),
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    result = trace.analyse(file, "steps", num_steps=1)
    assert "share_in_gaps" not in result
    kernels = {kernel["name"]: (kernel["milliseconds"], kernel["calls"]) for kernel in result["kernels"]}
    assert kernels == {"aten::inner": (0.05, 3), "aten::outer": (0.02, 1)}


def test_the_gpu_script_tests_itself_without_a_gpu_and_outlives_a_part_that_dies(tmp_path):
    peer = tmp_path / "diffusers" / scripts.PEER
    peer.parent.mkdir(parents=True)
    peer.write_text("import os; os._exit(3)")
    script, output = Path(compare.__file__).with_name("gpu.py"), tmp_path / "result.json"
    parts = ["profile", "training", "peer_training", "sampling"]
    options = [
        "--minutes",
        5,
        "--output",
        output,
        "--diffusers_repo",
        tmp_path / "diffusers",
        "--only",
        ",".join(parts),
    ]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    process = subprocess.run(
        [sys.executable, script, *map(str, options)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 1, process.stderr
    results = json.loads(output.read_text())["parts"]
    assert list(results) == parts
    errors = {part: result["error"] for part, result in results.items()}
    assert errors.pop("peer_training").startswith("ended with code 3")
    assert errors == dict.fromkeys(errors), process.stdout
    (profile,) = results["profile"]["rows"]
    assert profile["milliseconds"] > 0 and len(profile["kernels"]) > 5
    assert any("conv" in kernel["name"] for kernel in profile["kernels"])
    assert [row["name"] for row in results["training"]["rows"]] == ["ours, tiny, batch 2", "ours, tiny, batch 4"]
    for row in results["training"]["rows"] + results["sampling"]["rows"]:
        assert row["images_per_second"] > 0, row


@pytest.mark.parametrize(
    "script",
    [
        "bench",
        "built_in",
        "digits",
        "families",
        "few_steps",
        "gpu",
        "guided",
        "interpolation",
        "killed",
        "levers",
        "peers",
        "nodes",
        "optimizers",
        "solvers",
    ],
)
def test_scripts_run_by_their_path_from_any_folder(script, tmp_path, monkeypatch, capsys):
    path = Path(compare.__file__).with_name(f"{script}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])  # as Python sets it for a script
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(path), run_name="__main__")
    assert exit_.value.code == 0
    assert f"usage: {path.name}" in capsys.readouterr().out


# ---- Levers ----------------------------------------------------------------------------------------------------------


def test_a_lever_is_compared_with_the_base_above_real_images():
    def row(lever, seed, kernel):
        distances = {"frechet_distance": [10 * kernel, 0.1], "kernel_distance": [kernel, 0.01]}
        real = {"kernel_distance, real images": 0.1}
        row = {"data": "d", "length": "9", "lever": lever, "seed": seed, "images": 64}
        return row | distances | real | {"held_out_error": 1.0, "bits_per_dim": [2, 1]}

    rows = [row("base", 0, 0.4), row("base", 1, 0.6), row("adamw", 0, 0.3)]  # 0.5 and 0.3 in the mean
    rows[2]["held_out_error"] = None  # of a folder without a test split; and without bits
    del rows[2]["bits_per_dim"]
    base, adamw = levers.lines_of(rows)[2:]
    assert base == "| d | 9 | base | 2 | 64 | 5 &plusmn; 1 | 0.5 &plusmn; 0.1 | 1 &plusmn; 0 | 2 &plusmn; 0 | 1.00 |"
    assert adamw == "| d | 9 | adamw | 1 | 64 | 3 | 0.3 |  |  | 0.50 |"


def test_every_lever_is_a_setting_of_train_py_or_a_network(tmp_path):
    for lever in [*levers.LEVERS, *levers.NETWORKS]:
        options = levers.options_of(lever, tmp_path / lever)
        assert parse(["--dataset_name", "moons", *options]).dataset_name == "moons"
    options = levers.options_of("batch 16 + heads of 16+adamw", tmp_path / "run")
    assert options[2:] == ["--train_batch_size", "16", "--optimizer", "adamw"]
    network, tiny = (
        network_of(make_denoiser(find_network(name), height=32, width=32, in_channels=3))
        for name in (options[1], "tiny")
    )
    assert json.dumps(network) == json.dumps({**tiny, "attention_head_dim": 16})


def test_a_lever_that_does_not_exist_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "levers.py d=folder --levers base,more --max_train_images 64 --name x".split())
    with pytest.raises(SystemExit):
        levers.main()
    assert "levers has 'more': give some of base, uniform" in capsys.readouterr().err


def test_the_time_to_a_distance_is_on_a_line_between_two_runs():
    def row(trainer, minutes, distance):
        of = {"trainer": trainer, "images": 1000, "minutes": minutes}
        return {**of, "frechet_distance": distance, "kernel_distance": [0.5, 0.01]}

    ours = [row(peers.OURS, 1.0, 80.0), row(peers.OURS, 4.0, 20.0), row(peers.OURS, 16.0, 10.0)]
    assert peers.minutes_to(40.0, ours) == pytest.approx(2.0)
    assert peers.minutes_to(20.0, ours) == pytest.approx(4.0)
    assert peers.minutes_to(90.0, ours) == 1.0
    assert peers.minutes_to(9.0, ours) is None
    lines = peers.lines_of([*ours, row(peers.DIFFUSERS, 9.0, 40.0), row(peers.DIFFUSERS, 20.0, 9.0)])
    assert lines[-2].endswith("| 40 | 0.5 &plusmn; 0.01 | 2.0 | 4.5 |")
    assert lines[-1].endswith("| 9 | 0.5 &plusmn; 0.01 |  |  |")
