"""Short names of a run's settings, which say only how they differ."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parchgrad.evaluation.methods import CONTROLS
from parchgrad.statistics.selectors import registered_selectors

__all__ = ["Labels", "describe", "is_control", "is_edit", "label_settings", "name_of", "words_of"]

# The plain gradient and Grad-CAM are methods in their own right.
_CONTROLS = frozenset(CONTROLS) - {"gradient", "Grad-CAM"}
_RULES = ("gates", "antialias", "balance")
_FIELDS = ("quantile", "softness", "layers", "gamma", "conserve", *_RULES)
_METHODS = {"gradient": "plain gradient", "grad_cam": "Grad-CAM", "smoothgrad": "SmoothGrad"}
_MASKS = {"another": ", channels of another class", "shuffled": ", shuffled channels"}
_LAYERS = {"all": "all layers", "auto": "automatic layers", "published": "published layers"}
_SWITCHES = {"antialias": "smooth strides", "balance": "balance"}


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Names of a run's settings.

    Attributes:
        names: label of each setting by its title, different for different settings.
        shared: what does not differ, in words, by the selector that it belongs to; `"All"` for all selectors.
    """

    names: Mapping[str, str]
    shared: Mapping[str, str]


def label_settings(rows: Sequence[Mapping[str, Any]]) -> Labels:
    """Label each setting by its method and selector, and by what differs between settings that share both.

    Args:
        rows: rows of one run; see `read_rows`.

    Example:
        >>> from parchgrad.evaluation.settings import Grid
        >>> grid = Grid(selectors=("energy",), quantiles=(0.1, 0.3))
        >>> labels = label_settings([{"setting": setting.title, **vars(setting)} for setting in grid.settings()])
        >>> list(labels.names.values())[-2:]
        ['random channels, as Gradient energy, quantile 0.3', 'Gradient energy, quantile 0.3']
        >>> labels.shared["Gradient energy"].split(", ")[:3]
        ['softness 0.5', 'upper 0.5 of the layers', 'conserve energy']
    """
    described: dict[str, dict[str, Any]] = {}
    for row in rows:
        described.setdefault(row["setting"], describe(row))
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for title, own in described.items():
        if own:
            families.setdefault(name_of(own), {})[title] = own
    names, common = {title: title for title in described}, {}
    for name, members in families.items():
        varying = _distinguishing(members.values())
        for title, own in members.items():
            # A rule that is off needs no words where nothing is selected.
            shown = varying if "selector" in own else [field for field in _RULES if own.get(field)]
            names[title] = ", ".join([name, *(words_of(field, own[field]) for field in shown if field in own)])
        if _is_own_selection(next(iter(members.values()))):
            common[name] = {
                field: " or ".join(dict.fromkeys(words_of(field, own[field]) for own in members.values()))
                for field in _FIELDS
                if field not in varying and all(str(own.get(field, "inf")) != "inf" for own in members.values())
            }
    edits = {title: own for title, own in described.items() if _is_own_selection(own)}
    for title, own in described.items():
        twin = next((edit for edit in edits if _twins(own, edits[edit])), None)
        if twin is not None:
            names[title] = f"random channels, as {names[twin]}"
    counts = Counter(names.values())
    # A method of the caller's own may be called like another setting.
    names = {title: names[title] if counts[names[title]] == 1 else title for title in described}
    return Labels(names=names, shared=_shared_words(common))


def describe(row: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the settings of a row that apply to its method; empty for a method of the caller's own.

    Example:
        >>> describe({"method": "gradient", "selector": None, "gates": 2.0, "quantile": float("nan"), "gini": 0.5})
        {'method': 'gradient', 'gates': 2.0}
    """
    held = {key: value for key, value in row.items() if value is not None and value == value}
    keys: tuple[str, ...] = ("method", *_RULES) if "method" in held else ()
    if "selector" in held:
        keys = ("method", "selector", *_FIELDS, "masks")
    return {key: held[key] for key in keys if key in held}


def is_control(title: str, row: Mapping[str, Any]) -> bool:
    """Whether a setting only checks others: a map that ignores the network, or channels that are not the selector's.

    Example:
        >>> is_control("random map", {}), is_control("a", {"selector": "random"}), is_control("Grad-CAM", {})
        (True, True, False)
    """
    own = describe(row)
    return title in _CONTROLS or ("selector" in own and not _is_own_selection(own))


def is_edit(title: str, row: Mapping[str, Any]) -> bool:
    """Whether a setting edits with the selection of its own selector.

    Example:
        >>> is_edit("a", {"selector": "energy"}), is_edit("a", {"selector": "energy", "masks": "shuffled"})
        (True, False)
    """
    return title not in _CONTROLS and _is_own_selection(describe(row))


def name_of(described: Mapping[str, Any]) -> str:
    """Name the method and the selector of a described setting; empty for a method of the caller's own.

    Example:
        >>> name_of({"method": "smoothgrad", "selector": "evidence"}), name_of({"method": "gradient"})
        ('SmoothGrad with Evidence', 'plain gradient')
    """
    method: str = described.get("method", "")
    selector: str | None = described.get("selector")
    name = _METHODS.get(method, method.replace("_", " "))
    if selector is None:
        return name
    known = registered_selectors().get(selector)
    # The title of a selector may have a remark in parentheses.
    title = selector if known is None else known.title.partition(" (")[0]
    title += _MASKS.get(described.get("masks", "own"), "")
    return title if method in ("", "gradient") else f"{name} with {title}"


def words_of(field: str, value: Any) -> str:
    """Describe the value of one setting in words.

    Example:
        >>> words_of("layers", 0.5), words_of("antialias", False), words_of("quantile", 0.1)
        ('upper 0.5 of the layers', 'no smooth strides', 'quantile 0.1')
    """
    if field in _SWITCHES:
        return _SWITCHES[field] if value else f"no {_SWITCHES[field]}"
    if field == "layers" and isinstance(value, str):
        return _LAYERS.get(value, f"layers {value}")
    if field == "layers" and isinstance(value, list | tuple):
        return f"layers {'+'.join(value)}"
    if isinstance(value, int | float):
        short = f"{value:g}"
        value = short if float(short) == value else repr(value)
    return f"upper {value} of the layers" if field == "layers" else f"{field} {value}"


def _is_own_selection(described: Mapping[str, Any]) -> bool:
    return bool(described.get("selector", "random") != "random" and described.get("masks", "own") == "own")


def _twins(control: Mapping[str, Any], edit: Mapping[str, Any]) -> bool:
    """Whether random channels have the settings of an edit; their softness has no effect."""
    compared = ("method", *(field for field in _FIELDS if field != "softness"))
    return control.get("selector") == "random" and all(control.get(field) == edit.get(field) for field in compared)


def _distinguishing(settings: Collection[Mapping[str, Any]]) -> list[str]:
    """Pick the fields that tell these settings apart, the first ones if several follow from each other."""

    def apart(fields: Sequence[str]) -> int:
        return len({tuple(str(own.get(field)) for field in fields) for own in settings})

    found = [field for field in _FIELDS if apart([field]) > 1]
    for field in reversed(found):
        fewer = [other for other in found if other != field]
        found = fewer if apart(fewer) == len(settings) else found
    return found


def _shared_words(common: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What the settings of each selector share, and apart from it what all selectors do."""
    everywhere = {field: words for field, words in next(iter(common.values()), {}).items() if len(common) > 1}
    for own in common.values():
        everywhere = {field: words for field, words in everywhere.items() if own.get(field) == words}
    parts = {name: [own[field] for field in own if field not in everywhere] for name, own in common.items()}
    return {name: ", ".join(words) for name, words in {**parts, "All": list(everywhere.values())}.items() if words}
