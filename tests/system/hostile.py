"""Damage for files: bytes that are changed, cut and moved, and values that no writer writes in their structure."""

import json
import math

from hypothesis import strategies as st

DIGITS = "9" * 5000
DEEP = "[" * 20_000 + "]" * 20_000


class Raw(str):
    """A text that is put into JSON as it stands."""


class Inner:
    """JSON within a text of JSON, as headers of safetensors have it."""

    def __init__(self, value):
        self.value = value


class Fields(list):
    """A JSON object as pairs, which may have a name twice."""


VALUES = [
    *(None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, 1e30, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, Raw("1e999"), Raw(DIGITS), Raw(DEEP), Raw("{"), Raw('"\\ud800"'), Raw("")),
    *("", "0", "1", "nan", "inf", "gradient", "energy", "random", "a\0b", "\x1b[31m\u202e\n", "x" * 5000),
    *([], Fields(), [1], ["x"], [[]], [None], Fields([("a", 1)]), Fields([("name", "a"), ("name", "b")]), [0] * 300),
]


def parse(text):
    return json.loads(text, object_pairs_hook=Fields)


def dump(value):
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Inner):
        return json.dumps(dump(value.value))
    if isinstance(value, Fields):
        return "{" + ", ".join(f"{json.dumps(name)}: {dump(held)}" for name, held in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def spoilt(draw, value, depth=0):
    """JSON with one value, name or entry of it changed, at any depth."""
    if isinstance(value, Inner):
        return Inner(spoilt(draw, value.value, depth))
    if not isinstance(value, list) or not value or (depth and draw(st.integers(0, 7)) == 0):
        return draw(st.sampled_from(VALUES))
    place = draw(st.integers(0, len(value) - 1))
    how = draw(st.integers(0, 9))
    changed = type(value)(value)
    if how == 0:
        del changed[place]
    elif how == 1:
        changed.append(value[place])
    elif isinstance(value, Fields):
        name, held = value[place]
        if how == 2:
            changed[place] = draw(st.sampled_from([*(name for name, _ in value), "other", name + "@x", ""])), held
        else:
            changed[place] = name, spoilt(draw, held, depth + 1)
    else:
        changed[place] = spoilt(draw, value[place], depth + 1)
    return changed


@st.composite
def spoilt_bytes(draw, originals, most=4):
    """Bytes of their own, or one of some files with bytes changed, cut out, put in, doubled, or gone from its end."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, most))):
        how = draw(st.integers(0, 5))
        # Heads are worth more attention than what they describe.
        last = len(content) if draw(st.booleans()) else min(len(content), 200)
        at = draw(st.integers(0, last))
        length = draw(st.sampled_from([1, 2, 4, 8, 64]))
        if how == 0:
            content = content[:at]
        elif how == 1:
            del content[at : at + length]
        elif how == 2:
            content[at:at] = content[at : at + length]
        elif how == 3:
            content[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"9"])) * length
        else:
            content[at : at + length] = draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


@st.composite
def spoilt_safetensors(draw, originals):
    """A safetensors file whose header says something else than what its writer meant."""
    content = draw(st.sampled_from(originals))
    size = int.from_bytes(content[:8], "little")
    header, body = Fields(parse(content[8 : 8 + size])), content[8 + size :]
    where = next(place for place, (name, _) in enumerate(header) if name == "__metadata__")
    texts = Fields((name, Inner(parse(text)) if text[:1] in "[{" else text) for name, text in header[where][1])
    header[where] = "__metadata__", texts
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 3)):
            header[where] = "__metadata__", spoilt(draw, texts, 1)
            if not isinstance(header[where][1], Fields):
                break
            texts = header[where][1]
        elif draw(st.booleans()):
            # Another type of the same width keeps the file whole, and makes its numbers odd.
            place = draw(st.integers(0, len(header) - 1))
            name, described = header[place]
            if place != where:
                dtype = draw(st.sampled_from(["F64", "I64", "U64", "F32", "I32", "U32", "F16", "BF16", "U8", "BOOL"]))
                header[place] = name, Fields((key, dtype if key == "dtype" else held) for key, held in described)
        else:
            header = spoilt(draw, header)
            break
    text = dump(header).encode()
    length = len(text) if draw(st.integers(0, 15)) else draw(st.sampled_from([0, 2**63, 2**64 - 1, 10**9]))
    return length.to_bytes(8, "little") + text + body


@st.composite
def spoilt_numbers(draw, originals):
    """A safetensors file with numbers of its body replaced by ones that are no number, or a wrong one."""
    content = bytearray(draw(st.sampled_from(originals)))
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw(st.integers(1, 3))):
        at = start + 8 * draw(st.integers(0, max(0, (len(content) - start) // 8 - 1)))
        content[at : at + 8] = draw(
            st.sampled_from(
                [
                    b"\0" * 6 + b"\xf8\x7f",
                    b"\0" * 6 + b"\xf0\x7f",
                    b"\xff" * 8,
                    b"\0" * 8,
                    b"\xff" * 7 + b"\x7f",
                    b"\0\0\0\0\0\0\xf0\xbf",
                ]
            )
        )
    return bytes(content)


@st.composite
def spoilt_lines(draw, lines):
    """JSON on lines, some of them with values that no writer writes."""
    changed = list(lines)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(changed) - 1))
        changed[place] = dump(spoilt(draw, parse(lines[place])))
    return ("\n".join(changed) + "\n").encode()


TOML_VALUES = [
    *("-1", "0", "1", "2", "1e999", "nan", "-nan", "inf", "-inf", DIGITS, "9223372036854775808", "1" + "0" * 400),
    *('"none"', '"inf"', '""', '"shapes"', '"folder"', '"a\\u0000b"', '"\\u202e\\u001b"', "'''a\nb'''", "true"),
    *("[]", "[[]]", "{}", '["none"]', "[1, 'a', 2.5]", "{a = {b = 1}}", "1979-05-27", "07:32:00", DEEP, "{a = " * 3000),
    *("0.5", "[0.5, nan]", "[1e308]", "[" + "1," * 2000 + "]", '"' + "x" * 5000 + '"', "[{}]", "[true]"),
]


@st.composite
def spoilt_toml(draw, text):
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        how = draw(st.integers(0, 9))
        if how == 0:
            del lines[place]
        elif how == 1:
            lines.append(lines[place])
        elif how == 2:
            lines.insert(
                place, draw(st.sampled_from(["[data]", "[grid]", "[[grid]]", "[a." + "b." * 3000 + "c]", "[x]"]))
            )
        else:
            name = lines[place].partition("=")[0].strip() or "x"
            lines[place] = f"{name} = {draw(st.sampled_from(TOML_VALUES))}"
        if not lines:
            break
    return "\n".join(lines).encode()


XML_VALUES = [
    *("", "0", "1", "-1", "1e3", "nan", "inf", "99999999999", DIGITS, " 5 ", "٣", "x" * 3000, "<a/>", "&#0;", "&lol;"),
    *("<" + "a><" * 20_000, "<a>" * 20_000 + "</a>" * 20_000, "<![CDATA[5]]>", "<!--5-->", "&#x202e;", "&#55296;"),
]
XML_HEADS = [
    '<!DOCTYPE a [<!ENTITY lol "lol">' + "".join(f'<!ENTITY lol{i} "{"&lol;" * 10}">' for i in range(9)) + "]>",
    '<!DOCTYPE a [<!ENTITY lol SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">',
    '<?xml version="1.0" encoding="utf-7"?>',
    '<?xml version="1.0" encoding="rot13"?>',
    '<?xml version="1.0" encoding="x"?>',
    "\ufeff",
]


@st.composite
def spoilt_xml(draw, text):
    """An XML file with texts, elements and heads that no writer writes."""
    parts = text.replace("<", "\0<").replace(">", ">\0").split("\0")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(parts) - 1))
        how = draw(st.integers(0, 9))
        if how == 0:
            parts[place] = ""
        elif how == 1:
            parts[place] *= 2
        elif how == 2:
            parts[0] = draw(st.sampled_from(XML_HEADS)) + parts[0]
        else:
            parts[place] = draw(st.sampled_from(XML_VALUES))
    return "".join(parts).encode(errors="surrogatepass")
