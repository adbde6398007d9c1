"""Tiny untrained networks and pipelines: small enough for thousands of calls, with every part of a real one."""

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from ddpm_pipeline import DDPMPipeline, DDPMScheduler

# Two sizes, one layer each, no attention.
BLOCKS = {
    "block_out_channels": (4, 4),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "add_attention": False,
}


def tiny_unet(channels=1, size=8, *, seed=0, network_class=UNet2DModel, **options):
    """An untrained network in eval mode, the same weights for the same seed. `options` are those of UNet2DModel."""
    torch.manual_seed(seed)
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    return network_class(**{**BLOCKS, **shape, **options}).eval()


def tiny_pipe(channels=1, *, num_train_timesteps=20, scheduler=None, unet=None, dtype=torch.float32, **options):
    """A pipeline without a progress bar; `options` are those of the network."""
    scheduler = scheduler or DDPMScheduler(num_train_timesteps, timestep_spacing="trailing")
    return quiet(DDPMPipeline((unet or tiny_unet(channels, **options)).to(dtype), scheduler))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
