"""The trainer against a hand-written loop, and against itself after every kind of stop."""

from __future__ import annotations

import json
import math
import os
import signal
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segkit.errors import InputError
from segkit.runtime import derive_seed
from segkit.training import checkpoint
from segkit.training.failure import NonFiniteLoss
from segkit.training.memory import OutOfMemory
from segkit.training.optim import lr_factor, parameter_groups
from segkit.training.precision import Mixed
from segkit.training.tracking import Tracker
from segkit.training.trainer import Interrupted, Settings, Trainer

CPU = torch.device("cpu")


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    names: list
    indices: list


def make_batches(start: int, stop: int = 10_000):
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (4, 8, 8), generator=generator, dtype=torch.uint8)
        labels[torch.rand(4, 8, 8, generator=generator) < 0.2] = 255
        labels[0, step % 8 :] = 255  # parts with different numbers of valid pixels
        yield Batch(images, labels, [f"image{step}-{i}" for i in range(4)], list(range(4)))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.2, batchnorm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images):
        return self.head(self.dropout(F.relu(self.norm(self.encoder(images.float() / 255)))))


class MeanCrossEntropy(nn.Module):
    pixel_decomposable = True

    def denominator(self, target):
        return (target != 255).sum().float()

    def forward(self, logits, target, *, denominator=None):
        total = F.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum")
        return total / (self.denominator(target) if denominator is None else denominator)


def build(
    folder,
    *,
    net=None,
    loss=None,
    precision="fp32",
    validate=None,
    ema_decay=None,
    compile_model=False,
    stop=lambda: False,
    **numbers,
):
    net = net or Net()
    groups = parameter_groups(net, lr=0.01)
    settings = Settings(**{"phase": "train", "num_steps": 12, "seed": 0, "log_every": 1, **numbers})
    ema = None
    if ema_decay:
        ema = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=True
        )
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model=net,
        loss=loss or MeanCrossEntropy(),
        optimizer=torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
        settings=settings,
        mixed=Mixed(precision, CPU),
        tracker=Tracker(folder, phase="train", run_metrics=folder.parent / "all.jsonl", num_steps=settings.num_steps),
        folder=folder,
        validate=validate or (lambda model, step: {"mean_iou": step / 100}),
        config={"key": "value"},
        ema=ema,
        compile_model=compile_model,
        stop=stop,
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_equals_a_hand_written_loop(tmp_path):
    trainer = build(tmp_path / "a", warmup_steps=3, clip_norm=0.5)
    trainer.fit(make_batches)
    net = Net()
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=0.01), lr=0.01, weight_decay=0.1)
    losses = []
    for step, batch in zip(range(12), make_batches(0), strict=False):
        torch.manual_seed(derive_seed(0, "train", step, 0))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * lr_factor(step, num_steps=12, warmup_steps=3)
        loss = F.cross_entropy(net(batch.images), batch.labels.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    for ours, theirs in zip(trainer.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    written = [record["loss"] for record in records(tmp_path / "a") if record["split"] == "train"]
    assert written == pytest.approx(losses, rel=1e-5)


def test_accumulation_equals_the_whole_batch(tmp_path):
    """Parts have different numbers of valid pixels: only the common denominator gives the same gradient."""
    whole = build(tmp_path / "a", net=Net(dropout=0, batchnorm=False))
    parts = build(tmp_path / "b", net=Net(dropout=0, batchnorm=False), accumulate=4)
    whole.fit(make_batches)
    parts.fit(make_batches)
    for ours, theirs in zip(parts.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    first, second = ([record["loss"] for record in records(tmp_path / name)] for name in "ab")
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"ema_decay": 0.9}, {"precision": "fp16"}, {"precision": "bf16", "clip_norm": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [1, 5, 6])
def test_resume_is_bitwise(tmp_path, options, stop_at):
    numbers = {"evaluate_every": 4, "log_every": 3, "checkpoint_every": 1, **options}
    through = build(tmp_path / "a" / "p", **numbers)
    through.fit(make_batches)
    steps = iter(range(1, 100))
    stopped = build(tmp_path / "b" / "p", stop=lambda: next(steps) == stop_at, **numbers)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at}"):
        stopped.fit(make_batches)
    with open(tmp_path / "b" / "p" / "metrics.jsonl", "a") as file:
        file.write('{"written": "after the checkpoint"}\n')
    resumed = build(tmp_path / "b" / "p", **numbers)
    resumed.restore(checkpoint.load_last(tmp_path / "b" / "p" / "checkpoints"), earlier=b"earlier\n")
    resumed.fit(make_batches)
    for name, value in through.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    if through.ema is not None:
        for name, value in through.ema.module.state_dict().items():
            assert torch.equal(resumed.ema.module.state_dict()[name], value), name
    one, other = ((tmp_path / name / "p" / "metrics.jsonl").read_bytes() for name in "ab")
    assert one == other
    assert (tmp_path / "b" / "all.jsonl").read_bytes() == b"earlier\n" + other
    assert resumed.scaler.state_dict() == through.scaler.state_dict()


@pytest.mark.parametrize(
    ("num_steps", "every", "expected"), [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (5, None, [5]), (3, 9, [3])]
)
def test_evaluates_when_due_and_once_at_the_end(tmp_path, num_steps, every, expected):
    seen = []

    def validate(model, step):
        seen.append(step)
        return {"mean_iou": 0.5}

    build(tmp_path / "a", num_steps=num_steps, evaluate_every=every, validate=validate).fit(make_batches)
    assert seen == expected


def test_the_best_is_kept(tmp_path):
    scores = {4: 0.3, 8: 0.7, 12: 0.5}
    trainer = build(tmp_path / "a", evaluate_every=4, validate=lambda model, step: {"mean_iou": scores[step]})
    trainer.fit(make_batches)
    best = checkpoint.load(tmp_path / "a" / "checkpoints" / "best.pt")
    last = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")
    assert (best["step"], last["progress"]["step"]) == (8, 12)
    assert (trainer.progress.best_step, trainer.progress.best_score) == (8, 0.7)
    assert not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    class Poisoned(MeanCrossEntropy):
        calls = 0

        def forward(self, logits, target, *, denominator=None):
            self.calls += 1
            return super().forward(logits, target, denominator=denominator) * (math.nan if self.calls == 3 else 1)

    trainer = build(tmp_path / "a", loss=Poisoned())
    message = r"the loss is nan at step 3 of phase train for the images image2-0, image2-1.*lower optimizer.lr"
    with pytest.raises(NonFiniteLoss, match=message):
        trainer.fit(make_batches)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    bundle = tmp_path / "a" / "failure-0000002"
    assert json.loads((bundle / "error.json").read_text())["names"] == [f"image2-{i}" for i in range(4)]
    batch = torch.load(bundle / "batch.pt", weights_only=True)
    assert torch.equal(batch["images"], next(make_batches(2)).images)
    saved = torch.load(bundle / "state.pt", weights_only=True)
    assert saved["progress"]["step"] == 2


def test_a_failed_write_does_not_stop_training(tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.save_last, []

    def failing(folder, state):
        calls.append(state["progress"]["step"])
        if len(calls) == 2:
            raise OSError("the checkpoint could not be written")
        real(folder, state)

    monkeypatch.setattr(checkpoint, "save_last", failing)
    build(tmp_path / "a", checkpoint_every=4).fit(make_batches)
    assert calls == [4, 8, 12]
    assert "warning: the checkpoint could not be written" in capsys.readouterr().out


def test_evaluation_sees_the_moving_average(tmp_path):
    seen = []
    trainer = build(tmp_path / "a", ema_decay=0.5, validate=lambda model, step: seen.append(model) or {"mean_iou": 0})
    trainer.fit(make_batches)
    assert seen == [trainer.ema.module]
    saved = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")
    assert torch.equal(checkpoint.weights(saved)["head.weight"], trainer.ema.module.head.weight)
    assert not torch.equal(saved["model"]["head.weight"], saved["ema"]["head.weight"])


def test_training_mode_returns_after_an_evaluation(tmp_path):
    modes = []

    class Watching(Net):
        def forward(self, images):
            modes.append(self.training)
            return super().forward(images)

    def validate(model, step):
        model.eval()
        return {"mean_iou": 0.1}

    build(tmp_path / "a", net=Watching(), evaluate_every=3, validate=validate).fit(make_batches)
    assert modes == [True] * 12


def test_a_non_finite_gradient_stops_before_the_weights_change(tmp_path):
    class SteepAtZero(MeanCrossEntropy):
        """Finite, but its derivative at zero is infinite."""

        def forward(self, logits, target, *, denominator=None):
            return super().forward(logits, target, denominator=denominator) + (logits * 0).abs().sum().sqrt()

    trainer = build(tmp_path / "a", loss=SteepAtZero())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteLoss, match=r"the loss is 1\.\d+, but the norm of its gradient nan at step 1"):
        trainer.fit(make_batches)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    found = json.loads((tmp_path / "a" / "failure-0000000" / "error.json").read_text())["findings"]
    assert found["first_non_finite_module"] is None
    assert found["first_non_finite_gradient"] == "encoder.weight"


def test_a_sum_of_losses_with_a_denominator_each(tmp_path):
    """One part of the batch and four must agree, also where the terms count pixels differently."""

    class Sum(MeanCrossEntropy):
        def denominator(self, target):
            valid = (target != 255).sum().float()
            return torch.stack([valid, 3 * (target == 0).sum() + valid])

        def forward(self, logits, target, *, denominator=None):
            first, second = self.denominator(target) if denominator is None else denominator
            total = F.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum")
            return total / first + 0.5 * total / second

    nets = []
    for name, parts in (("a", 1), ("b", 4)):
        trainer = build(tmp_path / name, net=Net(dropout=0, batchnorm=False), loss=Sum(), accumulate=parts, num_steps=3)
        trainer.fit(make_batches)
        nets.append(trainer.model.state_dict())
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_crash_in_an_evaluation_costs_no_training(tmp_path):
    """The checkpoint comes first; going on begins with the evaluation, which is recorded once."""

    def validate_into(box):
        def validate(model, step):
            box[0].tracker.record(step, {"split": "val", "mean_iou": step / 100})
            if len(box) > 1 and step == 8:
                raise KeyError("a defect in the evaluation")
            return {"mean_iou": step / 100}

        return validate

    def run(name, *, crash):
        box = [None, "crash"] if crash else [None]
        trainer = box[0] = build(tmp_path / name / "p", evaluate_every=4, validate=validate_into(box))
        return trainer

    run("a", crash=False).fit(make_batches)
    with pytest.raises(KeyError):
        run("b", crash=True).fit(make_batches)
    again = run("b", crash=False)
    again.restore(checkpoint.load_last(tmp_path / "b" / "p" / "checkpoints"))
    assert again.progress.step == 8
    assert again.fit(make_batches) == {"mean_iou": 0.12}
    assert (tmp_path / "a/p/metrics.jsonl").read_bytes() == (tmp_path / "b/p/metrics.jsonl").read_bytes()
    assert again.progress.best_step == 12


def test_going_on_from_the_last_step_only_evaluates(tmp_path):
    build(tmp_path / "a").fit(make_batches)
    again = build(tmp_path / "a", validate=lambda model, step: {"mean_iou": 0.25})
    again.restore(checkpoint.load_last(tmp_path / "a" / "checkpoints"))
    assert again.fit(lambda step: pytest.fail("no batch is needed")) == {"mean_iou": 0.25}


def broken_after(num_batches, error):
    def batches(start):
        for step, batch in enumerate(make_batches(start), start=start):
            if step == num_batches:
                raise error
            yield batch

    return batches


def test_a_loader_error_leaves_the_state_and_a_bundle(tmp_path):
    trainer = build(tmp_path / "a", evaluate_every=4)
    trainer.names_of = lambda step: [f"street{step}"]
    message = r"aachen.png is truncated; step 6 of phase train had no batch, see .*failure-0000005.*state before it is"
    with pytest.raises(InputError, match=message):
        trainer.fit(broken_after(5, InputError("aachen.png is truncated")))
    saved = checkpoint.load_last(tmp_path / "a" / "checkpoints")
    assert saved["progress"]["step"] == 5
    noted = json.loads((tmp_path / "a" / "failure-0000005" / "error.json").read_text())
    assert (noted["names"], noted["step"], noted["kind"]) == (["street5"], 5, "InputError")
    assert noted["error"] == "aachen.png is truncated"


def test_a_defect_in_the_loader_keeps_its_traceback(tmp_path):
    trainer = build(tmp_path / "a")
    with pytest.raises(KeyError) as caught:
        trainer.fit(broken_after(3, KeyError("a defect")))
    assert "step 4 of phase train had no batch" in caught.value.__notes__[0]


def test_a_loader_error_after_an_evaluation_does_not_repeat_its_record(tmp_path):
    def run(name, batches):
        trainer = build(tmp_path / name / "p", evaluate_every=4)
        trainer.validate = lambda model, step: trainer.tracker.record(step, {"split": "val"}) or {"mean_iou": 0.5}
        state = checkpoint.load_last(tmp_path / name / "p" / "checkpoints")
        if state is not None:
            trainer.restore(state)
        trainer.fit(batches)

    run("a", make_batches)
    with pytest.raises(InputError):
        run("b", broken_after(4, InputError("a bad file")))
    run("b", make_batches)
    assert (tmp_path / "a/p/metrics.jsonl").read_bytes() == (tmp_path / "b/p/metrics.jsonl").read_bytes()


def test_a_stop_that_ends_the_loader_first_is_a_stop(tmp_path):
    asked = []
    trainer = build(tmp_path / "a", stop=lambda: bool(asked))

    def batches(start):
        yield from (batch for _, batch in zip(range(3), make_batches(start), strict=False))
        asked.append(True)
        raise InputError("a loading process died")

    with pytest.raises(Interrupted, match="stopped at step 3"):
        trainer.fit(batches)
    assert checkpoint.load_last(tmp_path / "a" / "checkpoints")["progress"]["step"] == 3


class Hungry(MeanCrossEntropy):
    """Wants more memory than any machine has."""

    def forward(self, logits, target, *, denominator=None):
        torch.empty(2**56, dtype=torch.uint8)


def test_out_of_memory_says_what_was_used_and_what_helps(tmp_path):
    trainer = build(tmp_path / "a", loss=Hungry())
    trainer.config = {"batch_size": 4, "accumulate": 1, "dataset": {"crop": [8, 8]}}
    message = (
        r"out of memory at step 1 of phase train: at most \d+\.\d\d GiB of RAM were in use and .* set "
        r"grad_checkpointing=true, or accumulate=2 \(2 of 4 images at once\), or a smaller dataset.crop than \[8, 8\]; "
        r"the batch is in .*failure-0000000"
    )
    with pytest.raises(OutOfMemory, match=message):
        trainer.fit(make_batches)
    batch = torch.load(tmp_path / "a" / "failure-0000000" / "batch.pt", weights_only=True)
    assert torch.equal(batch["images"], next(make_batches(0)).images)
    assert torch.load(tmp_path / "a" / "failure-0000000" / "state.pt", weights_only=True)["progress"]["step"] == 0


def test_out_of_memory_in_an_evaluation(tmp_path):
    trainer = build(tmp_path / "a", evaluate_every=4, validate=lambda model, step: torch.empty(2**56))
    trainer.config = {"evaluation": {"batch_size": 4}}
    with pytest.raises(OutOfMemory, match=r"in the evaluation after step 4.*set evaluation.batch_size=2, or precision"):
        trainer.fit(make_batches)
    assert checkpoint.load_last(tmp_path / "a" / "checkpoints")["progress"]["step"] == 4


def test_other_errors_of_a_step_go_through(tmp_path):
    class Wrong(MeanCrossEntropy):
        def forward(self, logits, target, *, denominator=None):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        build(tmp_path / "a", loss=Wrong()).fit(make_batches)
    assert not list((tmp_path / "a").glob("failure*"))


def test_a_bundle_that_cannot_be_written_does_not_hide_the_error(tmp_path, monkeypatch):
    trainer = build(tmp_path / "a", loss=Hungry())
    monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OutOfMemory, match=r"out of memory at step 1.*could not be written \(No space left on device\)"):
        trainer.fit(make_batches)


def test_the_loader_does_not_interrupt_an_update(tmp_path):
    """torch's loader sets a handler that raises when a process of it dies, wherever the main thread is."""
    trainer = build(tmp_path / "a", num_steps=2)

    def batches(start):
        signal.signal(signal.SIGCHLD, lambda number, frame: pytest.fail("raised in the middle of a step"))
        yield from make_batches(start)

    step = trainer._step
    trainer._step = lambda batch: (os.kill(os.getpid(), signal.SIGCHLD), step(batch))
    trainer.fit(batches)
    assert trainer.progress.step == 2


@pytest.mark.slow
def test_compiled_and_channels_last_train_the_same(tmp_path):
    plain = build(tmp_path / "a", net=Net(dropout=0), num_steps=3)
    net = Net(dropout=0).to(memory_format=torch.channels_last)
    other = build(tmp_path / "b", net=net, num_steps=3, channels_last=True, compile_model=True)
    plain.fit(make_batches)
    other.fit(make_batches)
    assert type(other.wrapped).__name__ == "OptimizedModule"
    assert set(other.state()["model"]) == set(plain.state()["model"])
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 3
