"""Evaluation of a model with calibrated steps: when they are the default, and that each table has its own samples."""

import copy
import os
from types import SimpleNamespace

import numpy as np
import torch

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.calibrated import Guidance, Table, save_tables
from tests.evaluation.helpers import evaluate_here
from tests.gaussian import gaussian_pipe
from training.evaluation.config import EvalConfig
from training.evaluation.evaluator import Evaluator
from training.evaluation.samples import Model


def test_calibrated_steps_are_the_default_where_the_model_has_them(run, work):
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    settings = {"dataset_name": "moons", "num_samples": 16, "metrics": ("kernel",), "num_inference_steps": (4, 5)}
    folders = []
    for last in (1.0, 0.9):  # another table has other samples
        rows = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, last]]
        save_tables(pipe.scheduler, pipe.unet, [Table([9, 6, 3, 0], [9, 6, 3, 0], rows)])
        pipe.save_pretrained(work / "calibrated")
        report = evaluate_here(work, work / "calibrated", "of calibrated", **settings)
        folder = max((work / "of calibrated").glob("evaluation/samples/*-steps4-calibrated-*"), key=os.path.getmtime)
        folders.append(folder)
        images = pipe(seeds=[0, 1], num_inference_steps=4, calibrated=True, output_type="np").images
        pixels = (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
        saved = np.load(folder / "00000.npy")[:2]
        assert np.abs(pixels.astype(int) - saved.astype(int)).max() <= 1
    assert folders[0] != folders[1]
    first, second = report["measurements"]
    assert (first["num_inference_steps"], first["eta"], first["primary"]) == (4, None, True)
    assert first["sampler"] == "DDPMScheduler, calibrated"
    assert (second["num_inference_steps"], second["eta"]) == (5, 1) and "eta 1" in second["sampler"]
    report = evaluate_here(work, work / "calibrated", "of calibrated", **settings, eta=(1.0,))
    assert [m["eta"] for m in report["measurements"]] == [1, 1]


def test_calibrated_steps_are_compared_at_equal_guidance_and_for_their_own_weights():
    pipe = gaussian_pipe(num_train_timesteps=10, num_class_embeds=2)
    table = Table([9, 3], [9, 3], [[0.5, 0.5], [0.0, 1.0]])
    model = Model(pipe, "EMA", "0" * 64, "1" * 64, None)

    def etas(model, tables, **settings):
        save_tables(pipe.scheduler, pipe.unet, tables)
        evaluator = SimpleNamespace(config=EvalConfig("x", num_inference_steps=(2, 3), **settings))
        return [sampler.eta for sampler in Evaluator._samplers(evaluator, model)]

    guided = table._replace(guidance=Guidance(2.0, guidance_interval=(2.0, 8.0)))
    scales = {"guidance_scales": (1.0, 2.0), "guidance_interval": (2.0, 8.0)}
    assert etas(model, [table]) == [None, 1]
    assert etas(model, [table], eta=(0.0, 1.0)) == [0, 0, 1, 1]
    assert etas(model, [table], **scales) == [1, 1, 1, 1]
    assert etas(model, [table, guided], **scales) == [None, 1, None, 1]
    online = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        online.conv_in.weight[0] += 1
    assert etas(model._replace(pipe=DDPMPipeline(online, pipe.scheduler)), [table]) == [1, 1]
