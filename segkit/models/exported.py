"""Files of a trained model, format by format: how they are written and read, each with metadata (a JSON object).

An ONNX or safetensors file is data. A program of torch.export is code: torch unpickles and evaluates what is in it, so
that only a file of one's own may be given to :func:`runner`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from segkit.errors import InputError, first_line
from segkit.models.segmenter import timm_entry

OPSET = 18
INPUT = "images"
"""Name of what goes into a graph"""
METADATA_KEY = "segkit"
"""Key of the metadata in an ONNX or safetensors file; the name of an extra file in one of torch.export."""
CHECKSUM_KEY = "sha256"
"""Key of the metadata in an ONNX or safetensors file: the SHA-256 of its tensors"""
MOST_METADATA = 2**20
"""Bytes of metadata beyond which a file is not read"""

Runner = Callable[[torch.Tensor], torch.Tensor]
"""images (N, C, H, W) float32 in 0..divisor -> logits (N, K, H, W), or scores, or classes (N, H, W)"""


def check_onnx() -> None:
    """Raise InputError if a package that :func:`write_onnx` and :func:`runner` need is not installed."""
    try:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            import_module(package)
    except ImportError as error:
        raise InputError(
            f"ONNX needs the package {error.name}, which is not installed: pip install 'segkit[export]', or give "
            "--format torch_export"
        ) from None


def write_onnx(program: torch.export.ExportedProgram, path: Path, text: str, *, output: str) -> None:
    """Translate ``program`` to ONNX and write it with the metadata ``text``."""
    import onnx

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it repeats what the error below says
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the translator, about its own internals
            translated = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[output], verbose=False
            )
    except Exception as error:  # the translator's errors share no base class
        raise InputError(
            f"the model cannot be translated to ONNX ({root_cause(error)}): give --format torch_export, or choose "
            "another model, such as model=deeplabv3plus"
        ) from error
    finally:
        logger.setLevel(level)
    assert translated is not None
    model = translated.model_proto
    onnx.helper.set_model_props(model, {METADATA_KEY: text, CHECKSUM_KEY: _graph_checksum(model.graph)})
    onnx.save(model, str(path))


def root_cause(error: BaseException) -> str:
    """Return the first line of the error that is the cause of all causes of ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def write_weights(state: Mapping[str, torch.Tensor], path: Path, text: str) -> None:
    """Write ``state`` as safetensors with the metadata ``text``; tensors that share memory are written apart."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    apart = {name: value.cpu().contiguous().clone() for name, value in state.items()}
    try:
        save_file(apart, path, {METADATA_KEY: text, CHECKSUM_KEY: _checksum(apart)})
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written ({error}): free some space, or give another --output") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the safetensors file ``path``; InputError for anything that is none."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise InputError(f"there is no file {path} with weights: write the folder again with segkit export")
    try:
        return read_safetensors(path)
    except Exception as error:  # the reader's errors share no public base class
        raise InputError(
            f"{path} cannot be read as safetensors ({first_line(error)}): copy it again, or write it with segkit export"
        ) from None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of ``path``; ValueError if they have not the checksum that :func:`write_weights` left."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
        known = (file.metadata() or {}).get(CHECKSUM_KEY)
    if known is not None and known != _checksum(state):
        raise ValueError("its tensors do not match the checksum within it")
    return state


def _checksum(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of ``state`` (contiguous tensors on the CPU)."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def runner(path: str | Path) -> Runner:
    """Return the function in the file ``path``; onnxruntime computes that of an ONNX file. InputError without one."""
    try:
        if Path(path).suffix != ".onnx":
            return torch.export.load(path).module()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # it writes names of a stranger's nodes, and repeats the error
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the loaders' errors share no base class
        raise InputError(
            f"{path} cannot be loaded ({first_line(error)}): copy it again, or write it with segkit export"
        ) from None
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a file that segkit exported; InputError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no exported model {path}: write one with segkit export")
    try:
        facts = json.loads(_metadata_text(path))
        if not isinstance(facts, dict):
            raise ValueError
    except Exception:  # what the readers of the formats raise for a foreign file is not one family
        raise InputError(f"{path} is not a model that segkit exported: write one with segkit export") from None
    return facts


def _metadata_text(path: Path) -> str:
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        properties = {item.key: item.value for item in model.metadata_props}
        text = properties[METADATA_KEY]
        known = properties.get(CHECKSUM_KEY)
        if known is not None and known != _graph_checksum(model.graph):
            warnings.warn(
                f"the weights in {path} are not those that segkit exported: copy it again, unless another program has "
                "changed them on purpose",
                stacklevel=2,
            )
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            text = file.metadata()[METADATA_KEY]
    else:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith(f"/{METADATA_KEY}"))
            if entry.file_size > MOST_METADATA or archive.testzip() is not None:
                raise ValueError
            text = archive.read(entry).decode("utf-8")
    if len(text) > MOST_METADATA:
        raise ValueError
    return text


def _graph_checksum(graph: Any) -> str:
    """SHA-256 of the weights of an ONNX graph, with their names, types and shapes."""
    digest = hashlib.sha256()
    for item in sorted(graph.initializer, key=lambda item: item.name):
        digest.update(f"{item.name} {item.data_type} {tuple(item.dims)}\n".encode() + item.raw_data)
    return digest.hexdigest()


def encoder_licence(name: str) -> str | None:
    """Return the licence that timm states for the published weights of the encoder ``name``; None for no statement."""
    entry = timm_entry(name)  # segmentation_models_pytorch states none
    return None if entry is None else entry.license
