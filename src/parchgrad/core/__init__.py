"""The method itself: pure torch, without file access."""
