"""The attribution methods of the original research code, at the place where it had them."""

from parchgrad.legacy.attribution_methods import get_input_attrib

__all__ = ["get_input_attrib"]
