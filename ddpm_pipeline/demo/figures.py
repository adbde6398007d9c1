"""Pictures as HTML. All of them are in the page itself, as data URIs: no file is left on the server, and none can be
fetched by another visitor. demo.js moves the sliders."""

import base64
from collections.abc import Sequence
from html import escape

from .jobs import Moment, Picture, Progress, Strip

Texts = dict[str, str]  # of one language


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _image(png: bytes, alt: str) -> str:
    return f'<img src="{uri(png)}" alt="{escape(alt)}">'


def _download(picture: Picture, texts: Texts, shown: str = "PNG", kind: str = "png") -> str:
    label = escape(texts["download"].format(name=picture.name))
    return (
        f'<a href="{uri(picture.png, kind)}" download="{escape(picture.name)}" aria-label="{label}">&#8681; {shown}</a>'
    )


def _figure(picture: Picture, alt: str, texts: Texts, after: str = "", says: bool = True) -> str:
    """A picture with its download, and HTML after it; `says` in words under the picture too what it is."""
    caption = f"{escape(alt)} " * says + _download(picture, texts) + after
    return f"<figure>{_image(picture.png, alt)}<figcaption>{caption}</figcaption></figure>"


def progress(now: Progress, texts: Texts) -> str:
    """x_t and x_0_pred while an image is sampled."""
    figures = [(now.x_t, texts["x_t"]), (now.x_0_pred, texts["x_0_pred"])]
    shown = "".join(
        f"<figure>{_image(png, alt)}<figcaption>{escape(alt)}</figcaption></figure>"
        for png, alt in figures
        if png is not None
    )
    status = escape(texts["sampling"].format(t=now.t))
    return f'<div class="demo-pictures demo-progress"><p role="status">{status}</p>{shown}</div>'


def gallery(pictures: Sequence[Picture], seed: int, texts: Texts) -> str:
    """Pictures of the seeds from `seed` on, each with its download."""
    figures = (
        _figure(picture, texts["image_of_seed"].format(seed=seed + i), texts) for i, picture in enumerate(pictures)
    )
    return f'<div class="demo-pictures demo-results">{"".join(figures)}</div>'


def strip(strip: Strip, texts: Texts) -> str:
    """The images between two images, with a slider, and the GIF."""
    number, gif = len(strip.pictures), f" {_download(strip.gif, texts, 'GIF', 'gif')}"
    frames = []
    for i, (picture, weight) in enumerate(zip(strip.pictures, strip.weights)):
        label = texts["between"].format(i=i + 1, n=number, weight=f"{weight:.3f}")
        frames.append((label, _figure(picture, label, texts, after=gif, says=False)))
    return _viewer(frames, number // 2, texts)


def trajectory(moments: Sequence[Moment], texts: Texts) -> str:
    """A trajectory with a slider over t."""
    frames = []
    for moment in moments:
        label = texts["forward" if moment.is_forward else "reverse"].format(t=moment.t)
        names = (texts["x_t"], texts["x_0_pred"])
        frames.append((label, "".join(_figure(picture, name, texts) for picture, name in zip(moment.pictures, names))))
    return _viewer(frames, len(frames) - 1, texts)


def _viewer(frames: Sequence[tuple[str, str]], first: int, texts: Texts) -> str:
    """Frames, (label, HTML), of which a slider selects the one that is shown."""
    shown = "".join(
        f'<div class="demo-pictures demo-frame" data-label="{escape(label)}"{" hidden" * (i != first)}>{html}</div>'
        for i, (label, html) in enumerate(frames)
    )
    label = escape(frames[first][0])
    slider = (
        f'<input type="range" min="0" max="{len(frames) - 1}" value="{first}" aria-label="{escape(texts["position"])}" '
        f'aria-valuetext="{label}" oninput="ddpmDemo.show(this)">'
    )
    return f'<div class="demo-viewer demo-results"><p><output>{label}</output></p>{slider}{shown}</div>'


def painter(height: int, width: int) -> str:
    """The canvas that a mask is painted on, one pixel for each pixel of the model. Its name is the text above it."""
    size = f'width="{width}" height="{height}"'
    return f'<canvas id="demo-mask" {size} tabindex="0" role="img" aria-labelledby="demo-paint"></canvas>'
