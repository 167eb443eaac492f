"""A number of things in words, for what commands print: 1 file, 2 files."""

from __future__ import annotations


def quantity(number: int, one: str, many: str = "", *, form: str = "") -> str:
    """A number with its noun.

    Args:
        number: How many.
        one: The noun for one of them.
        many: The noun for any other number; by default the same with an `s`.
        form: How the number is written, such as `,`.
    """
    return f"{number:{form}} {one if number == 1 else many or one + 's'}"
