"""MESSAGES: long lists in short messages."""

from collections.abc import Sequence

MOST = 5  # names in a message


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The names with a separator between them; of more than five the first five, and how many are left out."""
    left_out = len(names) - MOST
    return separator.join(names[:MOST]) + (f"{separator}and {left_out:,} more" if left_out > 0 else "")
