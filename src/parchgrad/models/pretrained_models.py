"""The encoders of the original research code, at their original import path."""

from parchgrad.legacy.pretrained_models import ENCODERS, get_pretrained_model

__all__ = ["ENCODERS", "get_pretrained_model"]
