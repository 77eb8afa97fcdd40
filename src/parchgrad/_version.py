"""The version, read by the build and by the manifests."""

__version__ = "0.2.0"
