"""Training with class labels: what the network sees, exact resume and ranks, what is saved, what is refused."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.likelihood import bits_per_dim, variational_bound
from ddpm_pipeline.pixels import from_pixels
from tests.arrays import random_images
from tests.models import quiet, tiny_unet
from tests.short_run import SHORT_RUN, flags, run_here, run_on_two
from training.data.classes import Classes
from training.run import checkpoint
from training.run.record import SAMPLE_SEED, RunRecord
from training.run.validation import Validation

OPTIONS = SHORT_RUN | {
    "class_conditional": True,
    "label_dropout": 0.3,
    "balance_classes": "sqrt",
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_sample_images": 4,
    "ddpm_num_inference_steps": 3,
    "checkpointing_steps": 3,
    "save_images_steps": 0,
    "validation_steps": 3,
    "num_validation_images": 2,
    "validation_samples": 4,
    "extractor": "pixels",
}
COUNTS = {"ant": 3, "bee": 7, "cow": 32}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for runs, with a folder of images: ants are black, bees gray and cows white, with a little noise."""
    work = tmp_path_factory.mktemp("runs")
    for brightness, (name, count) in enumerate(COUNTS.items()):
        (work / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = random_images(16, 16, 1, seed=i)[..., 0] // 16 + 120 * brightness
            Image.fromarray(pixels).save(work / "images" / name / f"{i}.png")
    return work


def command_line(work, name, **options):
    folders = {"output_dir": work / name, "cache_dir": work / "cache"}
    options = folders | OPTIONS | options
    if "dataset_name" not in options:
        options.setdefault("train_data_dir", work / "images")
    return flags(options)


def train(work, name, **options):
    return run_here("train.py", command_line(work, name, **options))


def hashes(path):
    return {name: file["sha256"] for name, file in checkpoint.verify(path)["files"].items()}


@pytest.fixture(scope="module")
def run(work):
    assert train(work, "run") == 0
    return work / "run"


def test_the_model_knows_its_names_and_the_record_its_classes(run):
    pipe = quiet(DDPMPipeline.from_pretrained(run / "pipeline"))
    assert pipe.class_names == tuple(COUNTS)
    assert pipe.unet.config.num_class_embeds == 4
    record = RunRecord.load(run / "pipeline")
    assert record.class_names == list(COUNTS)
    assert sum(record.class_counts) == record.num_images == 40  # of 42 images one in 20 is held out
    assert record.sample_labels == [0, 1, 2]
    assert len(record.labels_digest) == 64


def test_the_grid_has_a_row_for_each_class(run):
    """The images are those that the saved model gives for the recorded labels and seeds."""
    pipe, record = quiet(DDPMPipeline.from_pretrained(run / "pipeline")), RunRecord.load(run / "pipeline")
    seeds = [SAMPLE_SEED + i for i in range(3)]
    samples = pipe(seeds=seeds, class_labels=record.sample_labels, num_inference_steps=3, output_type="np").images
    grid = np.asarray(Image.open(run / "pipeline" / "samples.png")).astype(int)
    scale = grid.shape[1] // 20  # one column of 16 pixels with margins of 2
    for i, sample in enumerate(samples[..., 0]):
        shown = grid[scale * (2 + 18 * i) :: scale, 2 * scale :: scale][:16, :16]
        assert abs(shown - (255 * sample).round()).max() <= 1


@pytest.mark.parametrize(
    ("num_classes", "num_images", "labels"),
    [
        (3, 8, [0, 0, 1, 1, 2, 2]),
        (2, 1, [0]),
        (20, 10, list(range(0, 20, 2))),
        (20, 4, [0, 5, 10, 15]),
        (12, 64, [label for label in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10) for _ in range(6)]),
    ],
)
def test_labels_of_grids(num_classes, num_images, labels):
    classes = Classes(tuple(map(str, range(num_classes))), *[np.arange(num_classes)] * 2, np.arange(0))
    assert classes.of_grid(num_images) == labels


def test_labels_for_samples_are_as_frequent_as_in_the_data():
    """For any number of samples, to within one or two of the expected number of each class."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [100, 10, 890]))
    classes = Classes(("a", "b", "none", "d"), labels, labels, labels[:0])
    all_labels = np.array(classes.of_samples(np.arange(5000)))
    for number in (10, 64, 333, 1000, 5000):
        counts = np.bincount(all_labels[:number], minlength=4)
        assert abs(counts - number * np.array([0.1, 0.01, 0, 0.89])).max() < 2
    assert classes.of_samples(np.arange(64, 128)) == all_labels[64:128].tolist()
    assert len(set(all_labels[:20].tolist())) > 1  # mixed


def test_classes_have_the_numbers_of_a_model_with_more():
    labels = np.array([0, 1, 1, 0])
    classes = Classes(("a", "c"), labels, labels[:3], labels[3:]).numbered_as(("c", "b", "a"))
    assert classes.names == ("c", "b", "a")
    assert [each.tolist() for each in (classes.data, classes.train, classes.held_out)] == [[2, 0, 0, 2], [2, 0, 0], [2]]
    assert classes.counts == [2, 0, 1]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, work):
    assert train(work, "resumed", max_train_steps=3, lr_scheduler="constant") == 0
    options = {"lr_scheduler": "constant", "max_train_steps": 6}
    assert train(work, "whole", **options) == 0
    assert train(work, "resumed", resume_from_checkpoint="latest", **options) == 0
    assert hashes(work / "resumed" / "checkpoint-000006") == hashes(work / "whole" / "checkpoint-000006")


def test_two_ranks_with_micro_batches_equal_one(run, work):
    arguments = command_line(work, "two", train_batch_size=1, gradient_accumulation_steps=2)
    run_on_two("train.py", arguments)
    one, two = (checkpoint.load(folder / "checkpoint-000006")[1] for folder in (run, work / "two"))
    for name, tensor in one.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)
    entries = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (run, work / "two")]
    for name in ("validation_loss", "bits_per_dim", "kernel_distance"):
        assert entries[1][name] == pytest.approx(entries[0][name], rel=1e-3)


def test_the_network_learns_its_classes(work):
    """After 300 steps ants are dark and cows are bright: means of -1 + noise, 0 and 0.9.

    With 1000 diffusion timesteps, so that x_T is noise and the label alone tells the brightness.
    """
    options = {
        "max_train_steps": 300, "lr_scheduler": "constant", "learning_rate": 2e-3, "validation_steps": 0,
        "validation_samples": 0, "checkpointing_steps": 300, "logging_steps": 100, "balance_classes": "equal",
        "train_batch_size": 8, "ema_max_decay": 0.9, "prediction_type": "sample", "ddpm_num_steps": 1000,
    }  # fmt: skip
    assert train(work, "learnt", **options) == 0
    pipe = quiet(DDPMPipeline.from_pretrained(work / "learnt" / "pipeline"))
    means = [
        pipe(class_labels=name, seeds=list(range(8)), num_inference_steps=5, output_type="latent").images.mean().item()
        for name in COUNTS
    ]
    assert means[0] < -0.6 and abs(means[1]) < 0.3 and means[2] > 0.6


def test_without_dropout_there_is_no_null_class(work):
    assert train(work, "no dropout", label_dropout=0, max_train_steps=1, validation_steps=0, validation_samples=0) == 0
    pipe = DDPMPipeline.from_pretrained(work / "no dropout" / "pipeline")
    assert pipe.unet.config.num_class_embeds == 3
    with pytest.raises(ValueError, match="guidance_scale is 2"):
        pipe(class_labels="ant", guidance_scale=2)


def test_labels_of_a_metadata_file_condition_the_model(run, work, capsys):
    """With the same labels as the folders it is the same run; other labels are not resumed."""
    rows = [(path.relative_to(work / "images"), path.parent.name) for path in (work / "images").rglob("*.png")]
    copy = work / "copy" / "images"
    for path, _ in rows:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((work / "images" / path).read_bytes())

    def write(rows):
        with open(copy / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "label"), *rows])

    write(rows)
    assert train(work, "metadata", train_data_dir=copy) == 0
    assert hashes(work / "metadata" / "checkpoint-000006") == hashes(run / "checkpoint-000006")
    write([(path, {"ant": "bee", "bee": "ant"}.get(name, name)) for path, name in rows])
    options = {"train_data_dir": copy, "resume_from_checkpoint": "latest", "max_train_steps": 7}
    assert train(work, "metadata", **options) == 2
    assert "labels with sha256" in capsys.readouterr().err


def test_validation_gives_the_network_the_labels_of_the_images():
    torch.manual_seed(0)
    unet, scheduler = tiny_unet(num_class_embeds=3), DDPMScheduler(8)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(10)
    pixels, labels = random_images(5, 1, 8, 8), np.array([0, 1, 1, 0, 1])
    validation = Validation(pixels, 5, scheduler, labels=labels, device=torch.device("cpu"), batch_size=2)
    metrics, _ = validation.measure(lambda x, t, class_labels: unet(x, t, class_labels=class_labels).sample)
    bits = []
    with torch.no_grad():
        for i in range(5):  # one by one
            label = torch.from_numpy(labels[i : i + 1])
            x_0 = from_pixels(torch.from_numpy(pixels[i : i + 1]))
            bound = variational_bound(
                lambda x, t, label=label: unet(x, t, class_labels=label).sample, scheduler, x_0,
                index=torch.tensor([i]), seed=0, strata=7, levels=256,
            )  # fmt: skip
            bits.append(bits_per_dim(bound.total, x_0.shape[1:]).item())
    assert metrics["bits_per_dim"] == pytest.approx(np.mean(bits), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "moons"}, "have 0 different labels, and classes need at least 2"),
        ({"include": "cow"}, "different labels"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
        ({"class_conditional": False}, "balance_classes is 'sqrt', but class_conditional is false"),
        ({"label_column": "kind"}, "label_column is 'kind'"),
    ],
)
def test_a_mistake_exits_with_code_2_and_names_the_value(work, capsys, options, message):
    assert train(work, "mistake", **options) == 2
    assert message in capsys.readouterr().err
    assert not list((work / "mistake").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_conditional": False, "balance_classes": "none"}, "class_conditional True, but now it is False"),
        ({"label_dropout": 0.1}, "label_dropout 0.3"),
        ({"balance_classes": "equal"}, "balance_classes 'sqrt'"),
    ],
)
def test_a_run_with_other_labels_is_not_resumed(run, work, capsys, options, message):
    assert train(work, "run", resume_from_checkpoint="latest", max_train_steps=7, **options) == 2
    assert message in capsys.readouterr().err


def test_hardly_any_images_in_a_class_is_said(work, capsys):
    for i in range(9):
        path = work / "single" / f"class {i % 6}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(16, 16, 1, seed=i)[..., 0]).save(path)
    options = {"max_train_steps": 1, "validation_steps": 0, "validation_samples": 0}
    assert train(work, "few", train_data_dir=work / "single", **options) == 0
    assert "WARNING: 6 classes for 9 images" in capsys.readouterr().out
