"""Evaluating attribution maps."""
