"""What is read from a source is what Python says once that is imported."""

from __future__ import annotations

import inspect

import pytest

from segkit.config.signatures import read_signature
from segkit.config.targets import GROUPS, _hints, described, fits, locate

TARGETS = [
    (group, target, home)
    for group in ("model", "loss", "optimizer", "reader")
    for target, home in GROUPS[group].permitted.items()
]
VALUES = [
    None, True, -1, 0, 1.5, float("nan"), "a", "1", [], [1], [1, 2], [0.5, 1.5], ["a"], [[1]], {}, {"a": 1}, 2**70,
    "mean", "none",
]  # fmt: skip


@pytest.mark.parametrize(("group", "target", "home"), TARGETS)
def test_a_signature_that_is_read_is_that_of_the_object(group, target, home):
    signature = read_signature(home, target.rpartition(".")[2])
    assert signature is not None
    found = locate(target, key=group)
    real, hints = inspect.signature(found).parameters, _hints(found)
    assert list(signature.parameters) == list(real)
    assert signature.hints.keys() == hints.keys() - {"return"}
    for name, item in real.items():
        read = signature.parameters[name]
        empty = inspect.Parameter.empty
        assert (read.kind, read.default is empty, read.default is None) == (
            item.kind, item.default is empty, item.default is None,
        )  # fmt: skip
        if name in hints and name != "params":  # of optimizers: no value of a configuration
            accepted = [fits(value, signature.hints[name]) for value in VALUES]
            assert accepted == [fits(value, hints[name]) for value in VALUES], name
            assert described(signature.hints[name]) == described(hints[name])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(SOURCE): the signature of ``f`` in a module of a package that must not be imported."""
    folder = tmp_path / "for_signatures"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    def signature(source: str):
        (folder / "inner.py").write_text(source)
        read_signature.cache_clear()
        return read_signature("for_signatures.inner", "f")

    yield signature
    read_signature.cache_clear()


@pytest.mark.parametrize(
    "source",
    [
        "def f(a, /, b=1, *c, d: 'int', e: str | None = None, g=(1, 2.5), **h): ...",
        "class f:\n    def __init__(self, a: list[int], *, b: float = -1e-3): ...",
        "class g:\n    def __init__(self, a, b=None): ...\nclass f(g): ...",
        "def f(): ...",
    ],
)
def test_what_a_source_says(read, source):
    namespace = {}
    exec(source, namespace)
    real, signature = inspect.signature(namespace["f"]).parameters, read(source)
    assert [(item.name, item.kind, item.default) for item in signature.parameters.values()] == [
        (item.name, item.kind, item.default) for item in real.values()
    ]
    assert signature.hints == _hints(namespace["f"])


def test_a_type_that_is_not_known_takes_anything(read):
    hints = read("def f(a: Odd, b: odd.one, c: Odd[int], d: int | Odd, e: (1 / 0)): ...").hints
    assert all(fits(value, hint) for value in ("x", [1]) for hint in hints.values())


@pytest.mark.parametrize(
    "source",
    [
        "class f(Base): ...",
        "@made\ndef f(a): ...",
        "f = g",
        "async def f(a): ...",
        "def g(): ...\nclass f(g): ...",
        "class f: ...",
        "class f(f): ...",
        "",
    ],
)
def test_a_source_that_does_not_say_it(read, source):
    assert read(source) is None


def test_no_package_is_no_signature():
    assert read_signature("there_is_no_such_package.inner", "f") is None
    assert read_signature("segkit", "train") is None
