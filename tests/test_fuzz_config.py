"""Random values for every key of ``--cfg job``: each is accepted or refused in one sentence, none gives a traceback."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkit.config.compose import compose
from segkit.config.schema import Config, check_targets, plain
from segkit.guard import explain
from segkit.run.build import build_model, check_parts
from segkit.run.splits import open_phases

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
LOSSES = ("margin_calibration", "cross_entropy_dice", "focal", "ohem", "tversky", "jaccard_metric", "lovasz_softmax")
OPTIONS = ("model=coplenet", "optimizer=sgd", "schedule=pretrain_finetune", "model=smp", "schedule=single")
VALUES = (
    "-1", "0", "1", "2", "3.5", "1e-4", "1e400", "-.inf", "nan", "null", "true", "false", "maybe", "'1'", "''", "text",
    "1e-4f", "[]", "[1]", "[1,2]", "[2,3]", "[-1,0.5]", "[a,b]", "[[1]]", "[null]", "{}", "{a:1}",
    "{_target_:os.system}",
    "10000000000000000000000", "0x10", "1_000", "'a b'", "'ü'", "/nowhere", "'${oc.env:HOME}'", "'???'", "/data/d=1",
    "(1)",
    "~/data", "a,b", "$x", "\"'", "[1", "${seed}", "${nowhere}", "a:b", "#", "?", "auto", "cuda:7", "none", "mean",
)  # fmt: skip


def keys(value: object, prefix: str = "") -> list[str]:
    """Every dotted key of a plain configuration, inner nodes as well."""
    found = [prefix] if prefix else []
    if isinstance(value, dict):
        for name, item in value.items():
            found += keys(item, f"{prefix}.{name}" if prefix else name)
    return found


@functools.cache
def keys_of(*base: str) -> list[str]:
    return keys(plain(compose(base)))


def overrides(number: int) -> list[str]:
    """The ``number``-th command line: an option or two, and one key with a random value."""
    chance = random.Random(number)
    base = [f"loss={chance.choice(LOSSES)}"] + ([chance.choice(OPTIONS)] if chance.random() < 0.5 else [])
    key = chance.choice(keys_of(*base))
    prefix = chance.choice(("", "", "", "", "+", "++"))
    return [*base, f"{prefix}{key}={chance.choice(VALUES)}"]


def prepare(config: Config) -> None:
    """What a run does before its data are read, without allocating the network."""
    check_targets(config)
    splits = open_phases(config)
    check_parts(config, splits)
    with torch.device("meta"):
        build_model(config, next(iter(splits.values())).train.num_classes)


def outcome(arguments: list[str]) -> str | None:
    """None if ``arguments`` are accepted, else the one sentence; any other exception comes through."""
    try:
        prepare(compose(arguments))
    except Exception as error:
        sentence, code = explain(error)
        if sentence is None or code not in (1, 2):
            raise AssertionError(f"{arguments} gives {error!r}") from error
        assert len(sentence.splitlines()) == 1, (arguments, sentence)
        assert 10 < len(sentence) < 3000, (arguments, sentence)
        return sentence
    return None


WHOLE = "SEGKIT_FUZZ" in os.environ
"""Set SEGKIT_FUZZ=1 for all 300 lines, which takes minutes; else it is every 40th, and those that once failed."""

ONCE_FAILED = (58, 110, 114, 224, 240)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")
def test_random_values_are_accepted_or_refused_in_one_sentence(capsys):
    numbers = range(300) if WHOLE else sorted({*range(0, 300, 40), *ONCE_FAILED})
    failed, refused = [], 0
    for number in numbers:
        arguments = overrides(number)
        try:
            refused += outcome(arguments) is not None
        except AssertionError as error:
            failed.append(str(error))
    with capsys.disabled():
        print(f"\n{len(numbers)} random values: {refused} refused in a sentence, {len(failed)} gave something else")
    assert not failed, "\n".join(failed)
    assert len(numbers) / 3 < refused


@pytest.mark.slow
@pytest.mark.parametrize("line", [["loss=ohem", "dataset.reader.size=null"], ["loss=tversky", "clip_norm=nan"]])
def test_the_command_itself_says_the_same(line, tmp_path):
    """As a process: exit code 2, one line."""
    command = [sys.executable, str(TRAIN), *line, f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert not (tmp_path / "run").exists()
