"""Stands in for torchvision, which the project does not need, where the peer's training script imports it."""
