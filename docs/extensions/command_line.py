"""The commands and their options as tables, read off the command line itself."""

import re
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from parchgrad import cli


class CommandLine(SphinxDirective):
    """Sections for all commands, each with its help and a table of its options."""

    def run(self) -> list[nodes.Node]:
        """Write the sections in Markdown and have them read."""
        command = typer.main.get_command(cli.app)
        text = "\n\n".join(section for section in sections(command, "parchgrad"))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def sections(command: Any, name: str) -> Iterator[str]:
    """Describe a command, or those of a group."""
    for inner, found in getattr(command, "commands", {}).items():
        yield from sections(found, f"{name} {inner}")
    if not hasattr(command, "commands"):
        rows = [row for parameter in command.params if (row := row_of(parameter))]
        table = "\n".join(["| | | default |", "|---|---|---|", *rows])
        yield f"## {name}\n\n{plain(command.help)}\n\n{table}"


def row_of(parameter: Any) -> str | None:
    """A line of the table; none for the option that shows the help."""
    names = [option for option in parameter.opts if option.startswith("-")]
    if "--help" in names:
        return None
    shown = " ".join(f"`{option}`" for option in names) or f"`{parameter.name.upper()}`"
    said = getattr(parameter, "show_default", None)
    default = said if isinstance(said, str) else as_text(parameter.default)
    if parameter.required:
        default = "required"
    return f"| {shown} | {plain(parameter.help or '')} | {default} |"


def as_text(default: object) -> str:
    """A default as it would be typed; nothing for a flag that is off."""
    value = getattr(default, "value", default)
    return "" if value is None or value is False or callable(value) else f"`{value}`"


def plain(text: str) -> str:
    """Help without a terminal's marks, and with options as code: their dashes stay."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"(?<![\w-])(--[a-z][\w=-]*)", r"`\1`", part) for part in parts[::2]
    ]
    text = "".join(parts)
    return text.replace("\\[", "[").replace("|", "\\|").strip()


def setup(app: Sphinx) -> dict[str, bool]:
    """Name the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
