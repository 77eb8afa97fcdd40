"""Evaluate attribution maps."""
