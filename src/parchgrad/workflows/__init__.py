"""Workflows that the command line and the explorer share."""
