"""Attributions and heat maps of a model and its inputs."""
