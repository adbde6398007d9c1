"""What every short run of training/train.py in the tests is asked for; global batch 4 of 10 pictures, 6 steps."""

SHORT_RUN = {
    "denoiser": "tiny",
    "ddpm_num_steps": 20,
    "random_flip": True,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # Adam makes steps of full length of gradients that are 0 but for rounding, which differs
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "mixed_precision": "no",
    "cpu_threads": 1,
    "logging_steps": 1,
}
