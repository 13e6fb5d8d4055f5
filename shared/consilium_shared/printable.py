"""Text from outside, made safe for a screen, a log and a signed sentence."""

from __future__ import annotations

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str, keep: str = "") -> str:
    """The text with every character that cannot be printed replaced, but for those in ``keep``.

    Terminal escapes, line breaks, marks that change the writing direction and lone surrogates are not printable
    (``str.isprintable``); a terminal that gets them from a peer would show what the peer wants to be seen.

    >>> printable("ward 3\x1b[2J")
    'ward 3�[2J'
    """
    return "".join(c if c.isprintable() or c in keep else REPLACEMENT for c in text)
