"""A step does not wait for the device, and keeps its promise: what is not finite does not reach the weights."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from small_trainer import CPU, MeanCrossEntropy, Net, build, make_batches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segkit.errors import NonFiniteLoss, OutOfMemory
from segkit.training import checkpoint
from segkit.training.precision import Mixed
from segkit.training.step import split, train_step

NUM_STEPS = 6
OPTIMIZERS = {
    "adamw": lambda groups, fused: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=fused),
    "adam": lambda groups, fused: torch.optim.Adam(groups, lr=0.01, amsgrad=True, fused=fused),
    "sgd": lambda groups, fused: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=fused),
}


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class PoisonedNet(Net):
    """Its features are infinite in one step, so that loss, gradients and running statistics are not finite."""

    def __init__(self, bad_step: int) -> None:
        super().__init__()
        self.bad_step, self.calls = bad_step, 0

    def forward(self, images):
        self.calls += self.training
        return super().forward(images * (math.inf if self.training and self.calls == self.bad_step + 1 else 1))


class SteepLoss(MeanCrossEntropy):
    """Finite, but in one step its derivative is not."""

    def __init__(self, bad_step: int) -> None:
        super().__init__()
        self.bad_step, self.calls = bad_step, 0

    def forward(self, logits, target, *, denominator=None):
        self.calls += 1
        extra = (logits * 0).abs().sum().sqrt() if self.calls == self.bad_step + 1 else 0
        return super().forward(logits, target, denominator=denominator) + extra


def everything(trainer) -> list[torch.Tensor]:
    """Weights, buffers, moving average and the state of the optimizer."""
    held = [*trainer.model.state_dict().values()]
    held += [] if trainer.ema is None else [*trainer.ema.state_dict().values()]
    states = [trainer.optimizer.state[item] for group in trainer.optimizer.param_groups for item in group["params"]]
    return held + [torch.as_tensor(value) for state in states for _, value in sorted(state.items())]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_value_is_read_in_a_step(optimizer, clip_norm):
    net, loss, mixed = Net(), MeanCrossEntropy(), Mixed("fp32", CPU)
    made = OPTIMIZERS[optimizer](net.parameters(), True)
    batches = make_batches(0)
    arguments = {"mixed": mixed, "scaler": mixed.scaler(), "clip_norm": clip_norm}
    train_step(net, loss, made, split(next(batches), 2), **arguments).read()  # the optimizer makes its state
    with Reads() as reads:
        outcome = train_step(net, loss, made, split(next(batches), 2), **arguments)
    assert reads.count == 0
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.count == 1  # they are seen
    value, norm, stop = outcome.read()
    assert 0 < value < 3
    assert norm > 0
    assert stop is False


@pytest.mark.parametrize(("optimizer", "fused"), [("adamw", True), ("adamw", False), ("sgd", True)])
def test_whatever_step_is_not_finite_the_state_is_that_before_it(tmp_path, optimizer, fused):
    """Every step of a window, by its loss or by its gradient; against a run that ends before it."""
    for bad in (0, 1, 2, NUM_STEPS - 1):
        for net, loss in ((PoisonedNet(bad), None), (Net(), SteepLoss(bad))):
            folder = tmp_path / f"{bad}-{type(net).__name__}"
            trainer = build(folder, net=net, loss=loss, num_steps=NUM_STEPS, log_every=10, ema_decay=0.9)
            trainer.optimizer = OPTIMIZERS[optimizer](trainer.optimizer.param_groups, fused)
            with pytest.raises(NonFiniteLoss, match=f"at step {bad + 1} of phase train for the images image{bad}-0"):
                trainer.fit(make_batches)
            good = build(tmp_path / "good", num_steps=NUM_STEPS, log_every=10, ema_decay=0.9)
            good.optimizer = OPTIMIZERS[optimizer](good.optimizer.param_groups, fused)
            for batch, _ in zip(make_batches(0), range(bad), strict=False):
                good._step(batch)
            good._settle()
            state = torch.load(folder / f"failure-{bad:07d}" / "state.pt", weights_only=True)
            assert state["progress"]["step"] == bad
            assert equal(list(state["model"].values()), list(good.model.state_dict().values()))
            assert equal(list(state["ema"].values()), list(good.ema.module.state_dict().values()))
            # a first step that is skipped may have left zeros where no state was
            assert bad == 0 or equal(everything(trainer)[-3:], everything(good)[-3:])
            batch = torch.load(folder / f"failure-{bad:07d}" / "batch.pt", weights_only=True)
            assert batch["names"] == [f"image{bad}-{i}" for i in range(4)]


def test_the_weights_are_those_of_steps_that_wait(tmp_path, monkeypatch):
    """The same fused optimizer, read before each update, to the last bit; the moving average as well."""
    later = build(tmp_path / "a", ema_decay=0.9, log_every=5, clip_norm=0.5)
    later.fit(make_batches)
    monkeypatch.setattr("segkit.training.step.skips_by_itself", lambda optimizer: False)
    waiting = build(tmp_path / "b", ema_decay=0.9, log_every=5, clip_norm=0.5)
    for step, batch in zip(range(12), make_batches(0), strict=False):
        waiting._step(batch)
        waiting._settle()
        if (step + 1) % 5 == 0:
            waiting._log()
    assert equal(everything(later), everything(waiting))
    assert (tmp_path / "a" / "metrics.jsonl").read_text().startswith((tmp_path / "b" / "metrics.jsonl").read_text())


def test_a_step_that_fails_after_a_bad_one_is_not_the_one_that_is_told(tmp_path):
    class OutOfMemoryNet(PoisonedNet):
        def forward(self, images):
            if self.calls == self.bad_step + 1:
                raise MemoryError("no memory for the step after it")
            return super().forward(images)

    with pytest.raises(NonFiniteLoss, match="at step 4 of phase train for the images image3-0"):
        build(tmp_path / "a", net=OutOfMemoryNet(3), log_every=10).fit(make_batches)


def test_a_bad_step_before_the_end_of_the_data_is_told_too(tmp_path):
    trainer = build(tmp_path / "a", net=PoisonedNet(3), log_every=10)
    error = OSError("the disk is gone")

    def batches(start):
        for step, batch in enumerate(make_batches(start)):
            if step == 4:
                raise error
            yield batch

    with pytest.raises(NonFiniteLoss, match="at step 4"):
        trainer.fit(batches)
    assert checkpoint.find_last(tmp_path / "a" / "checkpoints") is None
    noted = json.loads((tmp_path / "a" / "failure-0000003" / "error.json").read_text())
    assert (noted["step"], noted["kind"]) == (3, "NonFiniteLoss")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_on_a_gpu(precision):
    from segkit.losses import CrossEntropyLoss, MarginCalibrationLoss
    from segkit.losses.checks import labels_checked

    device = torch.device("cuda")
    for loss in (CrossEntropyLoss(), MarginCalibrationLoss(rho_k0=[0.1] * 3, rho_0k=[0.1] * 3)):
        net, mixed = Net().to(device), Mixed(precision, device)
        optimizer = OPTIMIZERS["adamw"](net.parameters(), True)
        batches = make_batches(0)
        for number in range(5):
            batch = next(batches)
            batch = batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            try:
                with labels_checked(batch.labels, num_classes=3, ignore_index=255) if number else nullcontext():
                    outcome = train_step(
                        net, loss.to(device), optimizer, split(batch, 1), mixed=mixed, scaler=mixed.scaler()
                    )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert outcome.read()[0] > 0


def test_buffers_are_put_back_where_a_forward_pass_fails(tmp_path):
    class FailingHead(nn.Conv2d):
        calls = 0

        def forward(self, features):
            self.calls += 1
            if self.calls == 3:
                raise MemoryError
            return super().forward(features)

    net = Net()
    net.head = FailingHead(8, 3, 1)
    trainer = build(tmp_path / "a", net=net)
    with pytest.raises(OutOfMemory):
        trainer.fit(make_batches)
    state = torch.load(tmp_path / "a" / "failure-0000002" / "state.pt", weights_only=True)
    assert int(state["model"]["norm.num_batches_tracked"]) == 2
