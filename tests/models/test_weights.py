"""Weights from files: what loads, and what is said where something does not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from segkit.errors import InputError
from segkit.models.exported import read_weights, write_weights
from segkit.models.weights import load_encoder_weights, load_model_weights


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net.", "module.net.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_loads(tmp_path: Path, prefix: str, entry: str | None) -> None:
    source, net = small(), small()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state if entry is None else {entry: state, "step": 3}, tmp_path / "weights.pt")
    load_model_weights(net, tmp_path / "weights.pt")
    for key, value in net.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net.", "model.", "module.net.", "_orig_mod.module."])
def test_the_encoder_of_a_whole_model_in_any_wrapper_is_found(tmp_path: Path, prefix: str) -> None:
    source, encoder = small(), small()
    parts = {"encoder": source, "decoder": nn.Conv2d(4, 2, 1)}
    state = {f"{prefix}{key}": value for key, value in nn.ModuleDict(parts).state_dict().items()}
    torch.save({**state, "criterion.weight": torch.ones(2)}, tmp_path / "whole.pt")
    load_encoder_weights(encoder, "own", tmp_path / "whole.pt")
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_loads_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, net = small(), small()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_model_weights(net, str(tmp_path / "weights.safetensors"))
    assert torch.equal(net[0].weight, source[0].weight)


def test_weights_of_another_model(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Identity(), nn.Conv2d(5, 2, 1))
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    message = (
        r"model\.weights is .*weights\.pt, whose weights are of another model: 5 missing \(1\.weight, 1\.bias, "
        r"1\.running_mean, \.\.\.\); 2 unknown \(2\.weight, 2\.bias\); 2 of another shape "
        r"\(0\.weight \(5, 3, 1, 1\) instead of \(4, 3, 1, 1\), .*choose the model that they were trained with"
    )
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_model_weights(net, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Untrusted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which cannot be read as weights"),
        (b"PK\x03\x04 and then nothing", "which cannot be read as weights"),
        (pickle.dumps(Untrusted()), "which cannot be read as weights"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_model_weights(small(), tmp_path / "weights.pt")
    assert "never be printed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}, torch.zeros(3), {1: torch.ones(2)}])
def test_file_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="which holds no state dict: give a file with a mapping from names to tensors"):
        load_model_weights(small(), tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "net", "weights_of_mine"])
def test_wrapped_state_dicts(tmp_path: Path, name: str) -> None:
    own, other = small(), small()
    torch.save({"epoch": 3, name: other.state_dict()}, tmp_path / "weights.pt")
    if name == "weights_of_mine":
        with pytest.raises(InputError, match=r"tensors alone, such as perhaps stands in it under 'weights_of_mine'"):
            load_model_weights(own, tmp_path / "weights.pt")
    else:
        load_model_weights(own, tmp_path / "weights.pt")
        torch.testing.assert_close(own.state_dict(), other.state_dict())


CHANGED = {
    "int8": (lambda value: value.to(torch.int8), r"another type \(0\.weight torch\.int8 instead of torch\.float32"),
    "complex": (lambda value: value + 1j, "no dense tensor of real numbers"),
    "bool": (lambda value: value > 0, r"another type \(0\.weight torch\.bool"),
    "nan": (lambda value: value * float("nan"), r"with NaN in 6 entries, first 0\.weight: give other weights"),
    "meta": (lambda value: value.to("meta"), "no dense tensor"),
    "sparse": (lambda value: value.to_sparse(), "no dense tensor|cannot be read as weights"),
}


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("load", [load_model_weights, lambda net, path: load_encoder_weights(net, "own", path)])
def test_tensors_that_are_no_weights(tmp_path: Path, kind: str, load: Callable[..., None]) -> None:
    """torch would copy whole numbers into float32 without a word, and NaN was blamed on images at the first step."""
    change, message = CHANGED[kind]
    state = {key: change(value) if value.is_floating_point() else value for key, value in small().state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=message):
        load(small(), tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    source, net = small().to(dtype), small()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_model_weights(net, tmp_path / "weights.pt")
    assert torch.equal(net[0].weight, source[0].weight.float())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.weights is .*nowhere\.pt, but there is no such file"):
        load_model_weights(small(), tmp_path / "nowhere.pt")


def test_safetensors_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(.*\): free some space, or give another --output"):
        write_weights({"weight": torch.zeros(2)}, tmp_path, "{}")


def test_a_flipped_bit_in_safetensors_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {"weight": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16), "steps": torch.tensor(3)}
    write_weights(state, path, "{}")
    assert all(torch.equal(value, state[name]) for name, value in read_weights(path).items())
    save_file(state, tmp_path / "foreign.safetensors")
    assert sorted(read_weights(tmp_path / "foreign.safetensors")) == sorted(state)
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"safetensors \(its tensors do not match the checksum within it\): copy it"):
        read_weights(path)
    with pytest.raises(InputError, match=r"model\.weights is .* as weights \(its tensors do not match the checksum"):
        load_model_weights(small(), path)
