"""A hash of what a config means: the same for any spelling, order of keys or omitted default."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint(value: Any) -> str:
    """64 hex digits of SHA-256 over the canonical form of a config, a section, or plain JSON values."""
    return hashlib.sha256(canonical(value)).hexdigest()
