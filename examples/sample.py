"""Sample images from seeds, and show the trajectory of the first: `python examples/sample.py [MODEL]`."""

import sys

from ddpm_pipeline import DDPMPipeline, visualize

model = sys.argv[1] if len(sys.argv) > 1 else "runs/moons/pipeline"
pipe = DDPMPipeline.from_pretrained(model)

seeds = list(range(16))  # image i depends on seed i alone
x_0 = pipe(seeds=seeds, num_inference_steps=50, output_type="latent").images  # (16, C, H, W) in [-1, 1]
visualize.grid(x_0).save("samples.png")

steps = list(pipe.trajectory(seeds=seeds[:1], num_inference_steps=50))  # (t, x_t, prediction of x_0)
visualize.strip(steps).save("trajectory.png")
print("samples.png: 16 images; trajectory.png: x_t, and below it the predicted image")
