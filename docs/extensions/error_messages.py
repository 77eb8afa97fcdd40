"""Every error and warning of the package with its messages, read off its source."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import parchgrad

Names = Mapping[str, ast.expr]

# What a value is called in a message, where its name in the source says less.
_CALLED = {
    "error": "reason",
    "strerror": "reason",
    "str": "text",
    "join": "names",
    "get_args": "choices",
    "get": "value",
    "getattr": "value",
    "len": "number",
    "min": "number",
    "max": "number",
    "sum": "number",
    "numel": "number",
    "type": "type",
    "dim": "number",
}
# They change how a value is written, not what it is.
_TRANSPARENT = {"int", "list", "repr", "set", "sorted", "str", "tuple", "_called"}
_TRANSPARENT |= {"_first_line", "splitlines", "replace"}
_PLACE = re.compile("«.*?»")


@dataclass(frozen=True, order=True)
class Message:
    """What an error or warning says, with «places» for what it is filled with."""

    kind: str
    module: str
    text: str = field(compare=False)
    line: int

    def halves(self) -> tuple[str, str]:
        """What was wrong, and the remedy; the latter is empty where there is none."""
        whole = self.text.removesuffix(".")
        wrong, *remedies = re.split(r"(?<=[^.])\. (?=[A-Z`«])", whole, maxsplit=1)
        if not remedies:
            wrong, *remedies = re.split(", but (?!only)", whole, maxsplit=1)
        remedy = "".join(f"{text[0].upper()}{text[1:]}." for text in remedies)
        return f"{wrong}.", remedy


@dataclass(frozen=True)
class Raised:
    """A `raise`, by its place in the source: the class and the call that makes it."""

    module: str
    line: int
    made: str


class Source:
    """The source of a package, and what it raises and warns of.

    Attributes:
        kinds: each class of errors and warnings, with the first public one of it and
            its bases.
        docstrings: of the public classes.
        messages: all that is said, by class, module and line.
        others: what is raised beside these classes.
    """

    def __init__(self, root: Path) -> None:
        """Read every module below a folder."""
        self._trees = {
            module_of(path, root): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(root.rglob("*.py"))
        }
        own = self._trees["errors"].body
        classes = [node for node in own if isinstance(node, ast.ClassDef)]
        self.kinds = {node.name: node.name for node in classes}
        self.docstrings = {node.name: ast.get_docstring(node) or "" for node in classes}
        for tree in self._trees.values():
            for node in ast.walk(tree):
                bases = getattr(node, "bases", [])
                for base in map(ast.unparse, bases):
                    if base in self.kinds and node.name not in self.kinds:
                        self.kinds[node.name] = self.kinds[base]
        self._helpers = dict(self._find_helpers())
        self.messages: list[Message] = []
        self.others: list[Raised] = []
        for module, tree in self._trees.items():
            _Reader(self, module).visit(tree)
        self.messages = sorted(
            {(m.kind, m.module, m.text): m for m in self.messages}.values()
        )

    def _find_helpers(self) -> Iterator[tuple[str, ast.FunctionDef]]:
        """Functions that make an error for others to raise, and the common checks."""
        for module, tree in self._trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (
                    module == "_io.checks"
                    or any(map(self._returns_error, ast.walk(node)))
                ):
                    yield node.name, node

    def _returns_error(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Return) and name_of_call(node.value) in self.kinds

    def helper(self, name: str) -> ast.FunctionDef | None:
        """The function of that name, if it makes errors from what it is given."""
        return self._helpers.get(name)


class _Reader(ast.NodeVisitor):
    """Collects the messages of a module."""

    def __init__(self, source: Source, module: str) -> None:
        self._source, self._module = source, module
        self._names: dict[str, ast.expr] = {}

    def visit_Module(self, node: ast.Module) -> None:
        self._names = texts_in(node.body)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self._source.helper(node.name) is node:
            # Said where it is called, with what it is given there.
            return
        outer = self._names
        self._names = {**outer, **texts_in(node.body)}
        self.generic_visit(node)
        self._names = outer

    def visit_Raise(self, node: ast.Raise) -> None:
        made = node.exc
        for call in (
            (made.body, made.orelse) if isinstance(made, ast.IfExp) else (made,)
        ):
            name = name_of_call(call)
            if isinstance(call, ast.Call) and name in self._source.kinds:
                self._say(self._source.kinds[name], call, self._names)
            elif call is not None and self._source.helper(name) is None:
                found = Raised(self._module, node.lineno, ast.unparse(call))
                self._source.others.append(found)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        helper = self._source.helper(name_of_call(node))
        if helper is not None:
            self._say_of_helper(helper, node)
        elif ast.unparse(node.func) in ("warn", "warnings.warn"):
            kind = ast.unparse(node.args[1])
            if kind in self._source.kinds:
                self._say(self._source.kinds[kind], node, self._names)
        self.generic_visit(node)

    def _say_of_helper(self, helper: ast.FunctionDef, call: ast.Call) -> None:
        arguments = bound(helper, call)
        given = {
            name: ast.Constant(text_of(value, self._names))
            if is_text(value, self._names)
            else value
            for name, value in arguments.items()
        }
        names: dict[str, ast.expr] = {**given, **texts_in(helper.body)}
        for node in ast.walk(helper):
            made = getattr(node, "exc", None) or getattr(node, "value", None)
            if isinstance(node, ast.Raise | ast.Return) and isinstance(made, ast.Call):
                name = name_of_call(made)
                kind = ast.unparse(names[name]) if name in names else name
                if kind in self._source.kinds:
                    self._say(self._source.kinds[kind], made, names, line=call.lineno)

    def _say(
        self, kind: str, call: ast.Call, names: Names, line: int | None = None
    ) -> None:
        if call.args:
            text = " ".join(text_of(call.args[0], names).split())
            # Nothing but a place: the words of another error are passed on.
            if not _PLACE.fullmatch(text):
                found = Message(kind, self._module, text, line or call.lineno)
                self._source.messages.append(found)


def module_of(path: Path, root: Path) -> str:
    """Name of a module below the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def name_of_call(node: ast.AST | None) -> str:
    """What is called, without what it is an attribute of."""
    return ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""


def bound(function: ast.FunctionDef, call: ast.Call) -> dict[str, ast.expr]:
    """The arguments of a call by name, with the defaults of those that are left out."""
    given = function.args
    names = [item.arg for item in given.args if item.arg != "self"]
    found = dict(
        zip(names[len(names) - len(given.defaults) :], given.defaults, strict=True)
    )
    for item, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        if default is not None:
            found[item.arg] = default
    found |= dict(zip(names, call.args, strict=False))
    return found | {item.arg: item.value for item in call.keywords if item.arg}


def texts_in(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """Names that are given a text, once, and stand for it."""
    found: dict[str, list[ast.expr]] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    for inner in ast.walk(target):
                        if isinstance(inner, ast.Name):
                            found.setdefault(inner.id, []).append(node.value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) == 1 and is_text(values[0], {})
    }


def is_text(node: ast.expr, names: Names) -> bool:
    """Whether an expression writes a text of its own, rather than a value."""
    if isinstance(node, ast.Name) and node.id in names:
        return is_text(names[node.id], {})
    if isinstance(node, ast.IfExp):
        return is_text(node.body, names) and is_text(node.orelse, names)
    if isinstance(node, ast.BoolOp):
        return is_text(node.values[-1], names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_text(node.left, names) or is_text(node.right, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return is_text(node.left, names)
    return isinstance(node, ast.JoinedStr) or isinstance(
        getattr(node, "value", None), str
    )


def text_of(node: ast.expr, names: Names) -> str:
    """What an expression writes, with «places» for what is known only when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, names)
    # A text times a condition is written or left out.
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return text_of(node.left, names) if is_text(node.left, names) else "«number»"
    if isinstance(node, ast.BinOp) and is_text(node, names):
        return text_of(node.left, names) + text_of(node.right, names)
    if isinstance(node, ast.IfExp) and is_text(node, names):
        ways = (text_of(node.body, names), text_of(node.orelse, names))
        return " / ".join(dict.fromkeys(way for way in ways if way))
    if isinstance(node, ast.BoolOp) and is_text(node, names):
        first, last = text_of(node.values[0], names), text_of(node.values[-1], names)
        if not is_text(node.values[0], names):
            return f"{first} / {last}"
        return first or last
    if isinstance(node, ast.Name) and is_text(node, names):
        return text_of(
            names[node.id], {name: at for name, at in names.items() if name != node.id}
        )
    if isinstance(node, ast.Attribute) and node.attr == "__name__":
        inner = node.value
        if isinstance(inner, ast.Name) and isinstance(
            names.get(inner.id), ast.Name | ast.Attribute
        ):
            return ast.unparse(names[inner.id]).split(".")[-1]
    return f"«{called(node, names)}»"


def called(node: ast.expr, names: Names) -> str:
    """What a value is called, as far as the source tells."""
    if isinstance(node, ast.Name):
        if node.id in names and not isinstance(names[node.id], ast.Name):
            return called(names[node.id], {})
        return _CALLED.get(node.id, node.id.strip("_").replace("_", " ").lower())
    if isinstance(node, ast.Attribute):
        if node.attr == "__name__":
            return "type"
        return _CALLED.get(node.attr, node.attr.strip("_").replace("_", " "))
    if isinstance(node, ast.Call):
        name = name_of_call(node)
        if name in _TRANSPARENT:
            return called(node.args[0] if node.args else node.func.value, names)  # type: ignore[attr-defined]
        return _CALLED.get(name, "value")
    if isinstance(node, ast.Subscript):
        found = called(node.value, names)
        return "number" if found == "shape" else found
    if isinstance(node, ast.BoolOp):
        return called(node.values[0], names)
    if isinstance(node, ast.IfExp):
        return called(node.body, names)
    if isinstance(node, ast.BinOp):
        return "number"
    return "value"


class ErrorMessages(SphinxDirective):
    """A section for each class of errors and warnings, with its messages by module."""

    def run(self) -> list[nodes.Node]:
        """Write the sections."""
        root = Path(parchgrad.__file__).parent
        for path in root.rglob("*.py"):
            self.env.note_dependency(str(path))
        source = Source(root)
        sections = []
        for kind, docstring in source.docstrings.items():
            section = nodes.section(ids=[nodes.make_id(kind)], names=[kind.lower()])
            section += nodes.title(kind, kind)
            section += self.parse_text_to_nodes(docstring)
            of_kind = [message for message in source.messages if message.kind == kind]
            for module, messages in groupby(
                of_kind, key=lambda message: message.module
            ):
                heading = nodes.rubric("", "", classes=["error-module"])
                heading += nodes.literal(
                    "", ".".join(["parchgrad", module]).rstrip(".")
                )
                section += heading
                section += nodes.definition_list(
                    "",
                    *map(item_of, messages),
                    classes=["error-messages"],
                    # Quotes and dashes stay as they are typed and searched for.
                    support_smartquotes=False,
                )
            self.state.document.note_implicit_target(section)
            sections.append(section)
        return sections


def item_of(message: Message) -> nodes.definition_list_item:
    """What was wrong, and below it the remedy."""
    wrong, remedy = message.halves()
    term = nodes.term("", "", *inline(wrong))
    definition = nodes.definition("", nodes.paragraph("", "", *inline(remedy)))
    return nodes.definition_list_item("", term, definition)


def inline(text: str) -> Iterator[nodes.Node]:
    """A text with its places and what is code set apart."""
    for part in re.split("(`.*?`|«.*?»)", text):
        if part.startswith("«"):
            yield nodes.emphasis("", f"<{part[1:-1]}>")
        elif part.startswith("`"):
            yield nodes.literal("", part[1:-1].replace("«", "<").replace("»", ">"))
        elif part:
            yield nodes.Text(part)


def setup(app: Sphinx) -> dict[str, bool]:
    """Name the directive."""
    app.add_directive("error-messages", ErrorMessages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
