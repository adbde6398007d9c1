"""The parts of `training/calibrate.py`."""
