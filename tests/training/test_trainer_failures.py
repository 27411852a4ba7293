"""What a failure of a step, of the loader, of an evaluation or of the disk leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from small_trainer import MeanCrossEntropy, build, make_batches

from segkit.errors import InputError, Interrupted, NonFiniteLoss, OutOfMemory
from segkit.training import checkpoint


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    class Poisoned(MeanCrossEntropy):
        calls = 0

        def forward(self, logits, target, *, denominator=None):
            self.calls += 1
            if self.calls > 3:
                raise KeyError("the look at the failed step")
            return super().forward(logits, target, denominator=denominator) * (math.nan if self.calls == 3 else 1)

    trainer = build(tmp_path / "a", loss=Poisoned())
    terms = {"far": {"weight": 1e20, "loss": {}}, "near": {"weight": 2, "loss": {}}}
    trainer.config = {"encoder_lr_factor": 1e5, "lr_factors": {"head": 2000, "net": 1}, "loss": {"terms": terms}}
    message = (
        r"the loss is nan at step 3 of phase train for the images image2-0, image2-1.*: lower encoder_lr_factor "
        r"\(100000\), lr_factors.head \(2000\), loss.terms.far.weight \(1e\+20\), optimizer.lr \(schedule.train.lr"
    )
    with pytest.raises(NonFiniteLoss, match=message):
        trainer.fit(make_batches)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    bundle = tmp_path / "a" / "failure-0000002"
    noted = json.loads((bundle / "error.json").read_text())
    assert noted["names"] == [f"image2-{i}" for i in range(4)]
    assert noted["findings"] == {"error": "'the look at the failed step'"}
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


def test_a_stop_does_not_claim_what_was_not_saved(tmp_path, monkeypatch):
    trainer = build(tmp_path / "a", stop=lambda: True)
    monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\): free some space"):
        trainer.fit(make_batches)


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
        r"grad_checkpointing=light, or accumulate=2 \(2 of 4 images at once\), or a smaller dataset.crop than \[8, 8\]"
        r"; the batch is in .*failure-0000000; the run goes on .* hydra.run.dir and ignore_config_change=true"
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
