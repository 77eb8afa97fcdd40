"""Form and content of an error message, whatever its words."""

import re


def check_message(error, *facts):
    """Assert that a message has whole sentences, and names the parameters, values and layers that it is about."""
    text = str(error)
    for fact in facts:
        assert fact in text, f"{fact} is missing: {text}"
    words = re.sub(r"`[^`]*`|'[^']*'", "Code", text)
    for sentence in re.split(r"(?<=\.) ", words):
        assert re.fullmatch(r"[A-Z0-9]\S* .*[^.]\.", sentence), text
    assert not re.search(r"[A-Z]{2}", words), text
