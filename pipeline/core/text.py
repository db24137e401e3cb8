"""Plain text for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)
