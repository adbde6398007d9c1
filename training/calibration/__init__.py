"""Calibration: a sampler with few steps, fitted to a network, and its comparison with the schedulers of diffusers."""
