"""Evaluation data sets: reading images, and drawing some."""
