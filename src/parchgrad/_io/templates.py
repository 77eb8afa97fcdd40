"""HTML pages from the templates of the package."""

import functools
from typing import TYPE_CHECKING, Any

from parchgrad._io.extras import needs_extra

if TYPE_CHECKING:
    import jinja2

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Fill a template of the package; values are escaped in HTML.

    Args:
        template: file name in the folder `templates`.
        values: what the template shows.

    Raises:
        MissingExtraError: if Jinja is not installed.

    Example:
        >>> "url(a.png)" in render("explorer.css", thumbnails=["a.png"])
        True
    """
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> "jinja2.Environment":
    with needs_extra("evaluation"):
        import jinja2
    return jinja2.Environment(loader=jinja2.PackageLoader("parchgrad"), autoescape=jinja2.select_autoescape())
