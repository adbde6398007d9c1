"""The images between two images: `python examples/interpolate.py [MODEL] [IMAGE_A IMAGE_B]`."""

import sys
from math import pi

from PIL import Image

from ddpm_pipeline import DDPMPipeline, visualize
from ddpm_pipeline.moons import render

model = sys.argv[1] if len(sys.argv) > 1 else "runs/moons/pipeline"
pipe = DDPMPipeline.from_pretrained(model)
if len(sys.argv) > 3:
    a, b = (Image.open(path) for path in sys.argv[2:4])
else:
    a, b = render([pi / 2]), render([pi])  # a half and a full moon, (1, 1, 32, 32) in [-1, 1]

weights = [i / 8 for i in range(9)]
options = {"num_inference_steps": 50, "output_type": "latent"}
balanced = pipe.fuse(a, b, weights, balance=True, **options)  # weight = distance ratio
visualize.grid(balanced.images, columns=len(weights)).save("between.png")
for weight, ratio in zip(weights, balanced.distance_ratios):
    print(f"asked for distance ratio {weight:.3f}, found {ratio:.3f}")
