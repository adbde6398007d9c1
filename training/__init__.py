"""Training, evaluation and publishing: entry points here, over the packages data, run, evaluation and hub."""
