"""Docstrings and signatures as they are written here, made fit for reStructuredText."""

import re

from sphinx.application import Sphinx

# A shape such as (B, C, *S): an asterisk before a word would start an emphasis.
_STAR = re.compile(r"(?<![\w*\\`])(\*{1,2})(?=\w)")


def escape_stars(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Escape asterisks before words, other than in examples and between backticks."""
    for number, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        parts = re.split(r"(``.*?``|`[^`]*`)", line)
        parts[::2] = [
            _STAR.sub(lambda found: "\\*" * len(found[1]), part) for part in parts[::2]
        ]
        lines[number] = "".join(parts)


def hide_factories(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Write a default that is made anew each time as an ellipsis, which can be read."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Read every docstring before napoleon does."""
    app.connect("autodoc-process-docstring", escape_stars, priority=400)
    app.connect("autodoc-process-signature", hide_factories)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
