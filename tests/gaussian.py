"""Gaussian images, and a pipeline whose network is exact for them: every method has a closed form to compare with."""

import torch

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from tests.arrays import normal
from tests.models import quiet
from tests.oracles import GaussianUNet

MEAN, STD = 0.2, 0.3  # of every pixel, independently


def gaussian_images(number=2, channels=1, seed=0, dtype=torch.float64, size=8):
    return (MEAN + STD * normal(number, channels, size, size, seed=seed, dtype=dtype)).clamp(-1, 1)


def gaussian_pipe(prediction_type="epsilon", spacing="trailing", num_train_timesteps=1000, **options):
    """`options` are those of GaussianUNet."""
    scheduler = DDPMScheduler(
        num_train_timesteps, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False
    )
    unet = GaussianUNet(scheduler, prediction_type, mean=MEAN, std=STD, **options)
    return quiet(DDPMPipeline(unet, scheduler))
