"""What a training run is made of: runtime, checkpoints, signals, failures, logging, sampling, validation."""
