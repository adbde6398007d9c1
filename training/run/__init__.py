"""Parts of a training run: runtime, record, checkpoints, signals, failures, logging, sampling, validation."""
