"""The same weights with another scheduler of diffusers: `python examples/other_scheduler.py [MODEL]`."""

import sys

from diffusers import DPMSolverMultistepScheduler

from ddpm_pipeline import DDPMPipeline, visualize

model = sys.argv[1] if len(sys.argv) > 1 else "runs/moons/pipeline"
pipe = DDPMPipeline.from_pretrained(model)
ancestral = pipe(seeds=range(8), num_inference_steps=20, output_type="latent").images

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
solver = pipe(seeds=range(8), num_inference_steps=20, output_type="latent").images

visualize.grid(ancestral, columns=8).save("ddpm.png")
visualize.grid(solver, columns=8).save("dpm-solver.png")
print("ddpm.png and dpm-solver.png: the same seeds, 20 network calls each")
