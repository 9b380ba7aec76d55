"""What the value in a label column says."""

from __future__ import annotations

import re

LABEL_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}")  # one line that can be printed


def read_label(value: object) -> str | None:
    """The name of a class; None for an empty value. Raises ValueError for what is no name."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{value!r} is not a name")
    name = str(value).strip()
    if name and not LABEL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name")
    return name or None
