"""Draw the figures of docs/idea.md: `python docs/site/make_figures.py [MODEL]`; default: the model of `make moons`.

idea-space.png: all moons in their first two principal components, and two paths from a half to a full moon: the
straight line, and the images that the model interpolates. idea-forward.png: one moon at ten timesteps of the forward
process.
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.moons import render

IMAGES = Path(__file__).resolve().parents[1] / "images"
HALF, FULL = math.pi / 2, math.pi  # phases


def principal_components(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of images (N, ...), and the two directions (D, 2) in which they vary most."""
    flat = images.flatten(1).double()
    return flat.mean(0), torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:2].T


def draw_space(model: str, path: Path) -> None:
    phases = torch.linspace(0, 2 * math.pi, 361)[:-1]
    moons = render(phases)
    mean, directions = principal_components(moons)

    def project(images: Tensor) -> Tensor:
        return (images.flatten(1).double() - mean) @ directions

    pipe = DDPMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    half, full = render([HALF]), render([FULL])
    weights = [i / 8 for i in range(9)]
    between = pipe.fuse(half, full, weights, balance=True, num_inference_steps=50, output_type="latent").images
    straight = torch.cat([torch.lerp(half, full, weight) for weight in weights])

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*project(moons).T, s=6, color="0.7", label="true moons, one per degree of phase")
    axes.plot(*project(straight).T, "x--", color="tab:red", label="mean of the pixels")
    axes.plot(*project(between).T, "o-", color="tab:blue", label="interpolated by the model")
    for phase, name in ((0, "new"), (HALF, "half"), (FULL, "full"), (3 * HALF, "the other half")):
        x, y = project(render([phase]))[0].tolist()
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 6))
    for images, index, corner in ((straight, 4, (0.52, 0.30)), (between, 4, (0.52, 0.62))):
        inset = axes.inset_axes((*corner, 0.16, 0.22))
        inset.imshow(images[index, 0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        inset.set(xticks=[], yticks=[], title=("mean" if images is straight else "between"))
    axes.set(xlabel="first principal component", ylabel="second")
    axes.legend(loc=(0.1, 0.33), fontsize="small")
    figure.savefig(path, dpi=120)


def draw_forward(path: Path) -> None:
    t = torch.tensor([0, 20, 60, 120, 200, 300, 400, 550, 750, 999])
    scheduler = DDPMScheduler()
    moon = render([2.2]).expand(len(t), -1, -1, -1)
    x_t = scheduler.add_noise(moon, torch.randn(moon.shape, generator=torch.Generator().manual_seed(0)), t)
    figure = Figure(figsize=(9, 1.5), layout="constrained")
    for axes, index, image in zip(figure.subplots(1, len(t)), t.tolist(), x_t):
        axes.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"t = {index}\n{scheduler.alphas_cumprod[index]:.2g}", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw_space(sys.argv[1] if len(sys.argv) > 1 else "runs/moons/pipeline", IMAGES / "idea-space.png")
    draw_forward(IMAGES / "idea-forward.png")
    print(f"written: {IMAGES / 'idea-space.png'}, {IMAGES / 'idea-forward.png'}")
