"""What a run chooses for the machine, says before its first step, and keeps."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from segkit.config.compose import compose
from segkit.config.schema import Config, Precision, plain
from segkit.errors import InputError
from segkit.run import hardware, pipeline
from segkit.run.build import build_optimizer
from segkit.run.saved import open_run, read_config
from segkit.run.splits import open_phases
from segkit.runtime import let_waiting_threads_sleep

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = (
    "dataset.reader.num_images=6",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[32,32]",
    "batch_size=2",
    "schedule=single",
    "loss=cross_entropy",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "limit_steps=2",
    "workers=0",
    "device=cpu",
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
)


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(SMALL)


@pytest.fixture
def features(monkeypatch):
    """features(NAME...): the CPU has these and no others."""

    def give(*names: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))

    return give


def chosen(config: Config, device: torch.device, *, begun: Path | None = None, **values) -> tuple[str, bool, dict]:
    found, reasons = hardware.choose(dataclasses.replace(config, **values), begun=begun, device=device)
    return found.precision.value, found.channels_last, reasons


@pytest.mark.parametrize(
    ("names", "precision"),
    [(["avx512_bf16"], "bf16"), (["amx_bf16"], "bf16"), (["avx512_f", "amx_tile"], "fp32"), ([], "fp32")],
)
def test_a_cpu_computes_in_bf16_only_where_it_has_instructions_for_it(config, features, names, precision):
    features(*names)
    assert chosen(config, CPU)[:2] == (precision, True)


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")]
)
def test_a_gpu_computes_in_what_its_generation_has(config, monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, layout, reasons = chosen(config, GPU)
    assert (found, layout) == (precision, precision != "fp32")
    assert reasons["precision"] == f"a GPU of capability {capability[0]}.{capability[1]}"
    assert chosen(config, GPU, precision=Precision.bf16)[:2] == ("bf16", True)
    assert chosen(config, GPU, precision=Precision.fp32)[:2] == ("fp32", False)


def test_strict_determinism_and_the_users_own_values_win(config, features):
    features("amx_bf16")
    strict = dataclasses.replace(config, determinism=type(config.determinism).strict)
    assert chosen(strict, CPU)[:2] == ("fp32", False)
    assert chosen(strict, CPU, precision=Precision.bf16, channels_last=True)[:2] == ("bf16", True)
    assert chosen(config, CPU, precision=Precision.fp32, channels_last=False)[:2] == ("fp32", False)
    features()
    reason = chosen(config, CPU, precision=Precision.bf16)[2]["precision"]
    assert reason == "as configured, but this CPU only imitates it, several times slower than fp32"


def test_a_run_says_what_it_chose_before_its_first_step_and_keeps_it_elsewhere(tmp_path, features, capsys, monkeypatch):
    features()
    monkeypatch.chdir(tmp_path)
    config = compose([*SMALL, f"cache_dir={tmp_path}/cache"])
    pipeline.run(config, tmp_path / "run", open_phases(config), stop=lambda: False)
    said = capsys.readouterr().out
    head = said[: said.index("train step")]
    for text in ("precision  fp32 (a CPU without instructions for bf16)", "memory     channels last", "AdamW, fused"):
        assert text in head
    assert "train      2 steps of 2; evaluations: 1; images: 6 to train on, 2 to validate\n" in head
    assert f"folder     {tmp_path}/run\n" in head
    assert "curves     tensorboard --logdir run\n" in head  # as it is typed here
    assert "next:\n  segkit evaluate run --tta flip,ms\n" in said
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["precision"], saved["channels_last"]) == ("fp32", True)
    kernels = [item for item in open_run(tmp_path / "run").model().parameters() if item.ndim == 4]
    assert all(item.is_contiguous(memory_format=torch.channels_last) for item in kernels)  # as it was scored
    origin = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert origin["starts"][0]["chosen"]["precision"] == ["fp32", "a CPU without instructions for bf16"]

    features("amx_bf16")  # the run goes on where auto means something else
    longer = dataclasses.replace(config, limit_steps=3, ignore_config_change=True)
    pipeline.run(longer, tmp_path / "run", open_phases(longer))
    said = capsys.readouterr().out
    assert "precision  fp32 (as the run was started)" in said
    assert "precision is" not in said  # nothing changed
    assert read_config(tmp_path / "run" / "config.yaml").precision is Precision.fp32


def test_a_saved_auto_is_refused(tmp_path, config):
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(plain(config)))
    with pytest.raises(InputError, match="precision is auto, but a run's must say what was chosen: write fp32, bf16"):
        read_config(saved)


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ([], True),
        (["optimizer=sgd"], True),
        (["determinism=strict"], None),
        (["+optimizer.foreach=false"], None),
        (["+optimizer.fused=false"], False),
        (["optimizer._target_=torch.optim.RAdam"], None),
    ],
)
def test_the_fused_form_is_chosen_for_every_group_and_survives_a_checkpoint(overrides, fused):
    config = compose([*SMALL, *overrides])
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = build_optimizer(config, net, None)
    assert len(optimizer.param_groups) == 2  # weights, and what has no weight decay
    assert [group.get("fused") for group in optimizer.param_groups] == [fused, fused]
    net(torch.rand(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    other = build_optimizer(config, net, None)
    groups = other.state_dict()["param_groups"]
    other.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": groups})
    assert [group.get("fused") for group in other.param_groups] == [fused, fused]
    other.step()


def test_a_folder_is_named_as_it_is_typed_here(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert hardware.typed(here / "my runs" / "one") == "'my runs/one'"
    assert hardware.typed(tmp_path / "one") == f"{tmp_path}/one"
    here.rmdir()  # a run elsewhere ends all the same
    assert hardware.typed(tmp_path / "one") == f"{tmp_path}/one"


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_that_wait_spin_for_as_long_as_was_measured_or_as_the_user_says(own, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    found = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert found == (own or {"GOMP_SPINCOUNT": "10000"})


FAULTS = """
import resource, sys
import numpy as np
from segkit import memory, {module}
{module}.guarded = lambda *_, **__: None
sys.argv = ["segkit", "--help"]
{module}.main()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
faults, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, memory.held()
memory.give_back()
print(faults, held - memory.held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize(
    ("module", "own", "kept"), [("launch", None, True), ("cli", None, True), ("cli", "MALLOC_MMAP_THRESHOLD_", False)]
)
def test_freed_memory_is_kept_unless_the_user_says_else(module, own, kept, monkeypatch):
    """Page faults of an array of 64 MiB where one was freed before; a page has at least 4 KiB, or is a huge one."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, str(2**17))
    done = subprocess.run([sys.executable, "-c", FAULTS.format(module=module)], capture_output=True, text=True)
    faults, given_back = map(int, done.stdout.split())
    assert (faults < 16) is (given_back > 2**25) is kept
