"""Measuring a trained model: samples, metrics, the report."""
