"""Data whose noisy distributions are known in closed form, so that an exact network, score and density are known too.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Eq. 4, DDPM): a Gaussian stays a Gaussian, a mixture of
Gaussians a mixture. The best prediction is E[eps | x_t] = -sqrt(1 - alpha_bar_t) d log q(x_t) / dx_t.
"""

import math

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from tests.models import BLOCKS
from tests.schedules import alpha_bar_table


class Gaussian:
    """N(mean, std^2) for every pixel, independently.

    Args:
        alphas_cumprod: of a scheduler.
        mean: a number, or a tensor that broadcasts against the images.
        std: with 0 all the data is one image.
    """

    def __init__(self, alphas_cumprod, mean=0.2, std=0.3):
        self.alpha_bar = [*alphas_cumprod.tolist(), 1.0]  # the last one is that of t = -1, before the first step
        self.mean, self.std = mean, std

    def marginal(self, t):
        """Mean and variance of x_t: Eq. (4)."""
        return math.sqrt(self.alpha_bar[t]) * self.mean, self.alpha_bar[t] * self.std**2 + 1 - self.alpha_bar[t]

    def eps(self, x_t, t):
        """E[eps | x_t]."""
        mean, variance = self.marginal(t)
        return math.sqrt(1 - self.alpha_bar[t]) * (x_t - mean) / variance

    def prediction(self, x_t, t, prediction_type="epsilon"):
        """What a perfect network predicts."""
        eps = self.eps(x_t, t)
        signal, noise_std = math.sqrt(self.alpha_bar[t]), math.sqrt(1 - self.alpha_bar[t])
        if prediction_type == "epsilon":
            return eps
        x_0 = (x_t - noise_std * eps) / signal
        return x_0 if prediction_type == "sample" else signal * eps - noise_std * x_0

    def reverse_step(self, mean, variance, t, prev_t, eta, large=False):
        """Mean and variance after one reverse step from N(mean, variance), by DDIM's Eq. 12: x_0_pred and eps are
        linear in x_t. `large` is variance_type "fixed_large"; the last step adds no noise."""
        alpha_bar_t, alpha_bar_prev = self.alpha_bar[t], self.alpha_bar[prev_t]
        beta = 1 - alpha_bar_t / alpha_bar_prev
        sigma2 = eta**2 * beta * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        marginal_mean, marginal_variance = self.marginal(t)
        eps_slope = math.sqrt(1 - alpha_bar_t) / marginal_variance
        x_0_slope = (1 - math.sqrt(1 - alpha_bar_t) * eps_slope) / math.sqrt(alpha_bar_t)
        slope = math.sqrt(alpha_bar_prev) * x_0_slope + math.sqrt(max(1 - alpha_bar_prev - sigma2, 0)) * eps_slope
        # at the mean of the marginal, eps is 0 and x_0_pred is the mean of the data
        mean = math.sqrt(alpha_bar_prev) * self.mean + slope * (mean - marginal_mean)
        noise = 0.0 if prev_t == -1 else eta**2 * beta if large else sigma2
        return mean, slope**2 * variance + noise


class GaussianUNet(UNet2DModel):
    """A UNet2DModel that predicts what is exact for Gaussian data, and counts its calls.

    Args:
        scheduler: its alphas_cumprod are used.
        class_shift: with classes, the mean of class k is mean + class_shift * k.
    """

    def __init__(
        self, scheduler, prediction_type="epsilon", *, mean=0.2, std=0.3, size=8, channels=1, dtype=torch.float64,
        num_class_embeds=None, class_shift=0.1,
    ):  # fmt: skip
        super().__init__(
            **BLOCKS, sample_size=size, in_channels=channels, out_channels=channels, num_class_embeds=num_class_embeds
        )
        self.to(dtype)
        self.data = Gaussian(alpha_bar_table(scheduler), mean, std)
        self.predicts, self.class_shift, self.calls = prediction_type, class_shift, 0

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls += 1
        data = self.data
        if class_labels is not None:
            shift = (self.class_shift * class_labels.to(sample)).view(-1, 1, 1, 1)
            data = Gaussian(torch.tensor(data.alpha_bar[:-1], dtype=torch.float64), data.mean + shift, data.std)
        return (data.prediction(sample, int(timestep), self.predicts),)


class Mixture:
    """A mixture of Gaussians for every pixel, independently.

    Args:
        parts: (weight, mean, variance) of each component; the weights sum to 1.
    """

    def __init__(self, parts=((0.3, -0.7, 0.05), (0.7, 0.4, 0.2))):
        self.parts = parts

    def marginal(self, alpha_bar):
        """(weight, mean, variance) of each component of x_t."""
        return [(w, alpha_bar.sqrt() * mean, alpha_bar * variance + 1 - alpha_bar) for w, mean, variance in self.parts]

    def log_density(self, x_t, alpha_bar):
        """log q(x_t), summed over an image: (B,), nats."""
        parts = [
            math.log(w) - (x_t - mean).square() / (2 * variance) - (2 * math.pi * variance).log() / 2
            for w, mean, variance in self.marginal(alpha_bar)
        ]
        return torch.stack(parts).logsumexp(0).flatten(1).sum(1)

    def eps(self, x_t, alpha_bar):
        """E[eps | x_t], differentiable in x_t."""
        with torch.enable_grad():
            x_t = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_density(x_t, alpha_bar).sum(), x_t, create_graph=True)
        return -(1 - alpha_bar).sqrt() * score

    def network(self, scheduler):
        """The exact epsilon network (x_t, t), for fractions of t too."""
        return lambda x_t, t: self.eps(x_t, alpha_bar_at(scheduler, t))


def alpha_bar_at(scheduler, t):
    """alpha_bar at a fractional t, the first of a batch: log SNR is linear between two timesteps."""
    log_snr = scheduler.snr(torch.arange(scheduler.num_steps)).log()
    low = t[0].floor().long().clamp(0, scheduler.num_steps - 2)
    return torch.lerp(log_snr[low], log_snr[low + 1], (t[0] - low).double()).sigmoid()
