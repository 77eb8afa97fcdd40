"""Evaluation data sets: image files and generated shapes."""
