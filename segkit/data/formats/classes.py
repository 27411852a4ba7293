"""The file of classes of a folder of one's own: names, values, colours, and what is no class."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from segkit.data.files import read_text
from segkit.data.labels import UNKNOWN, VOID, LabelTable
from segkit.errors import InputError, first_line
from segkit.files import more_than_plain

CLASS_KEYS = ("names", "ids", "ignore", "colours", "unlabelled", "crowd")
TEXT, NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
MOST_ID = 65535


@dataclass(frozen=True, eq=False)
class FolderClasses(LabelTable):
    """A label table, and what a file of classes says beyond it.

    ``has_colours``, ``has_ids``: it names them. ``void_colours``, ``void_names``: what ``ignore`` has beside values.
    ``unlabelled`` (None: not said), ``crowd``: class numbers.
    """

    has_colours: bool = False
    has_ids: bool = False
    void_colours: tuple[tuple[int, int, int], ...] = ()
    void_names: tuple[str, ...] = ()
    unlabelled: int | None = None
    crowd: int = VOID


def read_classes(path: Path) -> FolderClasses:
    """Return the label table that a file of classes describes; raises InputError for all that does not fit together."""
    content = load_yaml(path)
    unknown = sorted(str(key) for key in content if key not in CLASS_KEYS)
    if unknown:
        raise InputError(f"{path} has an unknown key {unknown[0]!r}; allowed are {', '.join(CLASS_KEYS)}")
    return classes_of(content, path)


def classes_of(content: dict[str, Any], path: Path) -> FolderClasses:
    """Return the label table of ``content``, of the file ``path``; raises InputError as :func:`read_classes`."""
    names = content.get("names")
    if not isinstance(names, list) or not names:
        raise InputError(f"{path} has no list of names; write for example `names: [background, tool]`")
    if (num := len(names)) > UNKNOWN:
        raise InputError(f"{path} has {num} classes; 1 to {UNKNOWN} are allowed")
    if odd := [name for name in names if not name.strip() or name != name.encode(errors="ignore").decode()]:
        raise InputError(f"{path} has the name {odd[0]!r}, which is no text; give each class a name, in quotes")
    ids = _integers(content.get("ids"), path, key="ids", default=list(range(num)))
    given = content.get("ignore")
    kinds: dict[type, list[Any]] = {int: [], list: [], str: []}
    for item in given if isinstance(given, list) else ():
        kinds.get(type(item), kinds[int]).append(item)
    ignore = _integers(kinds[int] if isinstance(given, list) else given, path, key="ignore", default=[255])
    if len(ids) != num:
        raise InputError(f"{path} has {num} names but {len(ids)} ids; give one id for each name")
    colours = content.get("colours")
    if colours is not None and (not isinstance(colours, list) or len(colours) != num):
        length = len(colours) if isinstance(colours, list) else "no list of"
        raise InputError(f"{path} has {num} names but {length} colours; give [red, green, blue] for each name")
    if given is None and 255 in ids:
        raise InputError(
            f"{path} gives class {names[ids.index(255)]!r} the id 255, which is void unless the file says otherwise: "
            f"where 255 is a class, as in masks of 0 and 255, write these two lines: `ids: {ids}` and `ignore: []`"
        )
    palette = default_palette(num) if colours is None else _colours(colours, path)
    void_colours = tuple(tuple(colour) for colour in _colours(kinds[list], path).tolist())
    _check_once([*ids, *ignore], path, what="value", keys="ids and ignore")
    if colours is not None:
        _check_once([*map(tuple, palette.tolist()), *void_colours], path, what="colour", keys="colours and ignore")
    alike = [unicodedata.normalize("NFC", name).strip() for name in dict.fromkeys(names)]
    _check_once([*alike, *kinds[str]], path, what="name", keys="names and ignore")
    numbers: dict[Any, int] = {"void": VOID, **{name: number for number, name in enumerate(names)}}
    for key in ("unlabelled", "crowd"):
        if key in content and (not isinstance(content[key], str) or content[key] not in numbers):
            raise InputError(f"{path} has {key}: {content[key]!r}, but one of its names is wanted, or void")
    return FolderClasses(
        name=str(path),
        classes=tuple(names),
        palette=palette,
        raw_to_train={**dict(zip(ids, range(num), strict=True)), **dict.fromkeys(ignore, VOID)},
        train_to_raw=dict(enumerate(ids)),
        source=(str(path),),
        has_colours=colours is not None,
        has_ids="ids" in content,
        void_colours=void_colours,
        void_names=tuple(kinds[str]),
        unlabelled=numbers[content["unlabelled"]] if "unlabelled" in content else None,
        crowd=numbers[content["crowd"]] if "crowd" in content else VOID,
    )


def _check_once(values: list[Any], path: Path, *, what: str, keys: str) -> None:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise InputError(f"{path} uses {what} {twice[0]} twice among {keys}; each {what} has one meaning")


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the plain values in a YAML file of classes; raises InputError for damaged files and for more than that."""
    text = read_text(
        path,
        role="file of classes",
        missing=f"{path} does not exist; write one with `names: [background, tool]`, the classes of the label files in "
        "order, or name another file in dataset.reader.classes",
    )
    try:
        if reason := more_than_plain(text):
            raise InputError(f"{path} {reason}, but a file of classes has plain values only; write them out")
        node = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no valid YAML ({first_line(error)}); correct it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping; write for example `names: [background, tool]`")
    _check_spelling(node, path)
    return content


def _check_spelling(node: Any, path: Path) -> None:
    """Raise InputError for a key that is there twice, and for a class name that YAML does not read as text.

    ``node`` is the file as it is spelled: {key: value} as a list of pairs, in which `no` is not yet False.
    """
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise InputError(f"{path} has the key {key.value!r} twice, of which YAML drops one; remove one")
        seen.add(key.value)
        for name in value.value if key.value == "names" and isinstance(value, yaml.SequenceNode) else ():
            if not isinstance(name, yaml.ScalarNode):
                raise InputError(f"{path} has a list or mapping among its names; write one text for each class")
            if name.tag == NULL:
                raise InputError(f"{path} has an empty name ({name.value!r}); give each class a name, in quotes")
            if name.tag != TEXT:
                kind = name.tag.rpartition(":")[2]
                raise InputError(
                    f"{path} has the class name {name.value}, which YAML reads as {kind} and not as text; put it in "
                    f'quotes: "{name.value}"'
                )


def _integers(value: Any, path: Path, *, key: str, default: list[int]) -> list[int]:
    if value is None:
        return default
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MOST_ID for item in value):
        raise InputError(f"{path} has {key}: {value}, but a list of whole numbers from 0 to {MOST_ID} is wanted")
    return value


def _colours(colours: list[Any], path: Path) -> np.ndarray:
    for colour in colours:
        is_triple = isinstance(colour, list) and len(colour) == 3
        if not is_triple or not all(type(item) is int and 0 <= item <= 255 for item in colour):
            raise InputError(f"{path} has the colour {colour}, but [red, green, blue] of 0 to 255 is wanted")
    return np.array(colours, np.uint8).reshape(-1, 3)


def default_palette(num_classes: int) -> np.ndarray:
    """Return colours uint8 (num_classes, 3) that differ: bit i goes to channel i mod 3, high bits first."""
    colours = np.zeros((num_classes, 3), np.uint8)
    for k in range(num_classes):
        for bit in range(8):
            colours[k, bit % 3] |= ((k >> bit) & 1) << (7 - bit // 3)
    return colours
