"""Files of a run: written atomically, read with one sentence for what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from segkit.errors import InputError

MOST_BYTES = 2**20
"""Size of a saved configuration beyond which it is not read."""

_FOREIGN = "copy the config.yaml that segkit wrote, or train again"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Two processes may write the same file at once: one of the two contents stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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


def read_config_text(path: Path) -> dict[str, Any]:
    """The mapping in the saved configuration ``path`` (YAML or JSON), as plain values that nothing has resolved.

    A stranger may have written it: InputError for a file of more than :data:`MOST_BYTES`, for YAML's own references
    (a few lines can stand for terabytes), tags, and for ``${...}``, with which OmegaConf would read the environment.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f"{path} has {size} bytes, but a configuration has at most {MOST_BYTES}: {_FOREIGN}")
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise InputError(
                    f"{path} uses references or tags of YAML in line {event.start_mark.line + 1}, but a saved "
                    f"configuration has plain values only: {_FOREIGN}"
                )
            if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                raise InputError(
                    f"{path} has '${{' in line {event.start_mark.line + 1}, but a saved configuration has plain values "
                    f"only: {_FOREIGN}"
                )
        content = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read ({reason}): {_FOREIGN}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds no configuration: {_FOREIGN}")
    return {str(key): value for key, value in content.items()}
