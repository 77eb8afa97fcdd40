"""The version, read by the build and by the manifests."""

__version__ = "0.1.0"
