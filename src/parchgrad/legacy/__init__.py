"""API and pickles of the original research code."""
