"""Settings of Sphinx; `make docs` builds the pages with warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from parchgrad import __all__ as public
from parchgrad import __version__

project = "ParchGrad"
author = "the ParchGrad authors"
copyright = author  # noqa: A001 - Sphinx reads this name
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_line",
    "docstrings",
    "error_messages",
    "mathml",
]
exclude_patterns = ["extensions"]
language = "en"

# Notebooks are committed with their outputs, which the tests compare with a run.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"

# In docstrings single backticks stand around names; documented ones become links.
default_role = "py:obj"
add_module_names = False
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"ParchGrad {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_js_files = [("sort.js", {"defer": "defer"})]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#7a3b9a",
        "color-brand-content": "#7a3b9a",
    },
    "dark_css_variables": {
        "color-brand-primary": "#d9a0f0",
        "color-brand-content": "#d9a0f0",
    },
}


def _is_public_elsewhere(app, what, name, found, skipped, options):
    """Leave out names of the package itself, which have directives of their own."""
    return True if what == "module" and name in public else None


def setup(app):
    """Connect the hook."""
    app.connect("autodoc-skip-member", _is_public_elsewhere)
