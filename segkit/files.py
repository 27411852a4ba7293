"""Files of a run: written atomically, read with one sentence for what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from segkit.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN becomes null, so that any JSON reader takes the file."""
    write_atomically(path, json.dumps(without_nan(value), indent=2) + "\n")


def without_nan(value: Any) -> Any:
    """``value`` with None in place of every NaN or infinity."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; InputError if it is missing or torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there: the run has not got so far; run the same command again to go on"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): the run folder is damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: the run folder is damaged")
    return content
