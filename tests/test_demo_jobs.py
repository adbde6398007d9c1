"""The jobs of the demo, without a browser: the same images as the pipeline's methods, limits, uploads, files."""

import base64
import io
import json
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline.calibrated import Table, save_tables
from ddpm_pipeline.demo import figures
from ddpm_pipeline.demo.jobs import Model, Progress, Sampling, TimeUpError
from ddpm_pipeline.demo.texts import TEXTS, language_of
from ddpm_pipeline.images import to_output
from tests.models import tiny_pipe

FOUR = Sampling(seed=5, steps=4)


def model(pipe=None, **options):
    return Model(pipe or tiny_pipe(), "user/model", **options)


def last(job):
    *_, result = job
    return result


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.png)))


def settings(picture):
    return json.loads(Image.open(io.BytesIO(picture.png)).text["settings"])


def png(*size, mode="L"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def test_generated_images_are_those_of_the_pipeline_and_their_files_say_how_to_make_them():
    *progress, pictures = model().generate(FOUR, 3, eta=0.5)
    assert len(progress) == 3 and all(isinstance(now, Progress) and now.x_0_pred for now in progress)
    for picture, seed in zip(pictures, (5, 6, 7)):
        arguments = settings(picture)
        assert Image.open(io.BytesIO(picture.png)).text["seed"] == str(seed) == str(arguments.pop("seed"))
        assert (arguments.pop("model"), arguments.pop("method")) == ("user/model", "generate")
        again = tiny_pipe()(seeds=[seed], **arguments).images[0]
        assert np.array_equal(pixels(picture), np.asarray(again))


def test_a_calibrated_table_is_used_if_it_is_of_this_model():
    pipe, timesteps = tiny_pipe(), [19, 10, 1]
    save_tables(pipe.scheduler, pipe.unet, [Table(timesteps, timesteps, [[0.5, 0.5], [0.5, 0.6], [0.0, 1.0]])])
    calibrated = model(pipe)
    (picture,) = last(calibrated.generate(FOUR, 1, eta=1.0, table=calibrated.tables[0]))
    assert np.array_equal(
        pixels(picture), np.asarray(pipe(seeds=[5], num_inference_steps=3, calibrated=True).images[0])
    )
    (plain,) = last(calibrated.generate(FOUR, 1, eta=1.0))
    assert not np.array_equal(pixels(picture), pixels(plain))
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    assert not model(pipe).tables


def test_classes_and_guidance():
    pipe = tiny_pipe(num_class_embeds=3)
    classes = model(pipe)
    assert classes.class_names == ["0", "1", "2"] and classes.takes_guidance and not classes.takes_autoguidance
    (picture,) = last(classes.generate(Sampling(5, 4, class_label=1, guidance_scale=2.0), 1, eta=1.0))
    expected = pipe(seeds=[5], num_inference_steps=4, class_labels=1, guidance_scale=2.0).images[0]
    assert np.array_equal(pixels(picture), np.asarray(expected))
    with pytest.raises(ValueError, match="class is 3"):
        last(classes.generate(Sampling(steps=4, class_label=3), 1, eta=1.0))


def test_interpolation_ends_in_its_images_and_comes_as_a_gif():
    demo = model()
    a, b = (demo.read(picture.png) for picture in last(demo.generate(FOUR, 2, eta=1.0)))
    strip = demo.interpolate(a, b, FOUR, balance=False)
    expected = demo.pipe.fuse(a, b, [0.0, 1.0], num_inference_steps=4, output_type="latent").images
    for picture, image in zip((strip.pictures[0], strip.pictures[-1]), expected):
        assert np.array_equal(pixels(picture), np.asarray(to_output(image[None], "pil")[0]))
    gif = Image.open(io.BytesIO(strip.gif.png))
    assert gif.is_animated and json.loads(gif.info["comment"])["method"] == "fuse"


def test_repair_keeps_what_is_not_painted():
    demo = model()
    image = demo.read(last(demo.generate(FOUR, 1, eta=1.0))[0].png)
    bits = "".join("1" if i % 8 < 4 else "0" for i in range(64))
    pictures = demo.repair(image, demo.read_mask(bits), FOUR, 2)
    original = pixels(pictures[0]) * 0 + np.asarray(Image.open(io.BytesIO(demo.preview(image))))
    for picture in pictures:
        assert np.array_equal(pixels(picture)[:, 4:], original[:, 4:])
        assert not np.array_equal(pixels(picture)[:, :4], original[:, :4])
    assert not np.array_equal(*map(pixels, pictures))
    with pytest.raises(ValueError, match="the mask is empty"):
        demo.repair(image, demo.read_mask("0" * 64), FOUR, 1)
    for wrong in ("1" * 63, "2" * 64, "", None):
        with pytest.raises(ValueError, match=r"the mask is no text of \d+ x \d+ characters 0 or 1"):
            demo.read_mask(wrong)


def test_a_trajectory_goes_forward_from_the_image_and_back():
    demo = model()
    image = torch.zeros(1, 1, 8, 8)
    moments = last(demo.trajectory(image, FOUR))
    steps = list(demo.pipe.trajectory(image=image, seeds=[5], num_inference_steps=4, calibrated=False))
    assert [(moment.is_forward, moment.t) for moment in moments] == [(i < 4, step.t) for i, step in enumerate(steps)]
    for moment, step in zip(moments, steps):
        assert np.array_equal(pixels(moment.pictures[0]), np.asarray(to_output(step.x_t.clamp(-1, 1), "pil")[0]))
    assert not any(moment.is_forward for moment in last(demo.trajectory(None, FOUR)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Sampling(steps=0), "steps is 0: give an integer from 1 to 20"),
        (Sampling(steps=21), "steps is 21"),
        (Sampling(seed=-1, steps=4), "seed is -1"),
        (Sampling(seed=2**32, steps=4), "seed is 4294967296"),
    ],
)
def test_limits(wrong, message):
    demo = model()
    for job in (lambda: demo.generate(wrong, 1, eta=1.0), lambda: demo.trajectory(None, wrong)):
        with pytest.raises(ValueError, match=message):
            last(job())
    for number, eta, match in ((17, 1.0, "number is 17"), (0, 1.0, "number is 0"), (1, 1.5, "eta is 1.5")):
        with pytest.raises(ValueError, match=match):
            last(demo.generate(FOUR, number, eta))


def test_every_job_ends_when_its_time_is_up():
    demo = model(time_limit=-1.0)
    image, mask = torch.zeros(1, 1, 8, 8), torch.ones(8, 8, dtype=torch.bool)
    for job in (
        lambda: last(demo.generate(FOUR, 1, eta=1.0)),
        lambda: demo.interpolate(image, image + 0.5, FOUR, balance=True),
        lambda: demo.repair(image, mask, FOUR, 1),
        lambda: last(demo.trajectory(image, FOUR)),
    ):
        with pytest.raises(TimeUpError):
            job()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"channels": 2}, "2 channels: the demo shows 1, 3 or 4"), ({"class_embed_type": "timestep"}, "is 'timestep'")],
)
def test_a_model_that_no_job_can_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Model(tiny_pipe(**options), "user/model")


def test_uploads_are_read_as_in_training_and_within_limits(tmp_path):
    demo = model()
    assert torch.equal(demo.read(png(8, 8)), -torch.ones(1, 1, 8, 8))
    assert torch.equal(demo.read(png(8, 8, mode="RGBA")), torch.ones(1, 1, 8, 8))  # transparent is white
    for payload, message in (
        (b"not an image", "the image cannot be read: not an image in a known format$"),
        (b"", "the image cannot be read: empty"),
        (png(9, 8), "the image is 9 wide and 8 high: give one of 8 wide and 8 high"),
        (png(4097, 4097), "4097 x 4097 pixels: give at most"),
        (b"0" * (10 * 2**20 + 1), "the file has 10485761 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image in a known format"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.read(payload)


def test_the_name_has_no_path(tmp_path):
    folder = tmp_path / "moons" / "pipeline"
    folder.mkdir(parents=True)
    assert Model(tiny_pipe(), str(folder)).name == "moons"
    assert Model(tiny_pipe(), "user/model").name == "user/model"


def test_two_visitors_at_once_get_their_own_images():
    demo, results = model(), {}

    def visit(seed):
        results[seed] = last(demo.generate(Sampling(seed, 10), 2, eta=1.0))

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(0, 80, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, pictures in results.items():
        alone = last(model().generate(Sampling(seed, 10), 2, eta=1.0))
        assert [picture.png for picture in pictures] == [picture.png for picture in alone]


def test_the_html_holds_the_files_and_no_text_of_others():
    demo = Model(tiny_pipe(), '<script>"x"</script>')
    pictures = last(demo.generate(FOUR, 2, eta=1.0))
    for texts in TEXTS.values():
        html = figures.gallery(pictures, 5, texts)
        files = [base64.b64decode(data) for data in re.findall(r'<a href="data:image/png;base64,([^"]+)"', html)]
        assert files == [picture.png for picture in pictures]
        assert "<script" not in html
        moments = figures.trajectory(last(demo.trajectory(None, FOUR)), texts)
        assert moments.count('class="demo-pictures demo-frame"') == 4 and moments.count(" hidden>") == 3


def test_both_languages_have_the_same_texts():
    english, chinese = TEXTS["en"], TEXTS["zh"]
    assert list(english) == list(chinese)
    for key in english:
        assert sorted(re.findall(r"{\w*", english[key])) == sorted(re.findall(r"{\w*", chinese[key])), key
    assert language_of({"accept-language": "zh-CN,zh;q=0.9"}) == "zh" and language_of({}) == "en"
    assert language_of({"accept-language": "en-US,zh;q=0.9"}) == "en"
