"""A stand-in for torchvision, which the project does not need but the peer's training script imports."""
