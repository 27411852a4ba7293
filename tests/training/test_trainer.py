"""The trainer against a hand-written loop, and against itself after every kind of stop."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.nn.functional as F
from small_trainer import MeanCrossEntropy, Net, build, make_batches, records
from torch import nn

from segkit.errors import Interrupted
from segkit.runtime import derive_seed
from segkit.training import checkpoint, distributed
from segkit.training.optim import parameter_groups
from segkit.training.schedules import lr_factor


def test_equals_a_hand_written_loop(tmp_path):
    trainer = build(tmp_path / "a", warmup_steps=3, clip_norm=0.5)
    trainer.fit(make_batches)
    net = Net()
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=0.01), lr=0.01, weight_decay=0.1, fused=True)
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


def test_a_best_one_that_could_not_be_written_is_not_the_best(tmp_path, monkeypatch):
    scores = {4: 0.3, 8: 0.7, 12: 0.5}
    save = checkpoint.save_best

    def full_at_step_8(folder, state):
        if state["step"] == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save_best", full_at_step_8)
    trainer = build(tmp_path / "a", evaluate_every=4, validate=lambda model, step: {"mean_iou": scores[step]})
    trainer.fit(make_batches)
    assert checkpoint.load(tmp_path / "a" / "checkpoints" / "best.pt")["step"] == trainer.progress.best_step == 12
    assert trainer.progress.best_score == 0.5


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


def test_going_on_from_the_last_step_only_evaluates(tmp_path):
    build(tmp_path / "a").fit(make_batches)
    again = build(tmp_path / "a", validate=lambda model, step: {"mean_iou": 0.25})
    again.restore(checkpoint.load_last(tmp_path / "a" / "checkpoints"))
    assert again.fit(lambda step: pytest.fail("no batch is needed")) == {"mean_iou": 0.25}


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


def test_every_rank_evaluates_the_average_after_all_steps(tmp_path, monkeypatch):
    """A rank that writes no checkpoint must have read the last step as well, whatever is logged."""
    seen = []
    trainer = build(
        tmp_path / "a", ema_decay=0.5, num_steps=4, log_every=4, evaluate_every=3,
        validate=lambda model, step: seen.append((step, int(trainer.ema.n_averaged))) or {"mean_iou": 0},
    )  # fmt: skip
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    trainer.fit(make_batches)
    assert seen == [(3, 3), (4, 4)]
