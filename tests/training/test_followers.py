"""A loss that follows the training: its running IoU goes through checkpoints, parts of a batch, and ranks."""

from __future__ import annotations

import pytest
import torch
from small_trainer import CPU, Net, build, make_batches

from segkit.errors import Interrupted
from segkit.losses import CrossEntropyLoss, IouMarginLoss, SumLoss
from segkit.training import checkpoint, step
from segkit.training.precision import Mixed


def in_a_sum():
    terms = {"own": {"loss": IouMarginLoss(num_classes=3), "weight": 1.0}}
    return SumLoss(terms=terms | {"other": {"loss": CrossEntropyLoss(), "weight": 0.5}})


@pytest.mark.parametrize("make", [lambda: IouMarginLoss(num_classes=3, momentum=0.5), in_a_sum], ids=["alone", "term"])
def test_resume_is_bitwise(tmp_path, make):
    through = build(tmp_path / "a" / "p", loss=make())
    through.fit(make_batches)
    steps = iter(range(1, 100))
    stopped = build(tmp_path / "b" / "p", loss=make(), stop=lambda: next(steps) == 5)
    with pytest.raises(Interrupted):
        stopped.fit(make_batches)
    resumed = build(tmp_path / "b" / "p", loss=make())
    resumed.restore(checkpoint.load_last(tmp_path / "b" / "p" / "checkpoints"))
    (name, before), (_, after), (_, whole) = (
        next(iter(step.followers_of(trainer.loss).items())) for trainer in (stopped, resumed, through)
    )
    assert name == ("" if make is not in_a_sum else "losses.own")
    assert torch.equal(before.running, after.running)
    assert not torch.equal(after.running, IouMarginLoss(num_classes=3).running)
    resumed.fit(make_batches)
    assert torch.equal(after.running, whole.running)
    for key, value in through.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


def one_step(parts):
    """The running IoU after one step of a batch in so many parts."""
    torch.manual_seed(0)
    net, loss, batch = Net(dropout=0, batchnorm=False), IouMarginLoss(num_classes=3), next(make_batches(0))
    optimizer, mixed = torch.optim.SGD(net.parameters(), lr=0.1), Mixed("fp32", CPU)
    step.train_step(net, loss, optimizer, step.split(batch, parts), mixed=mixed, scaler=mixed.scaler())
    return loss.running


def test_parts_of_a_batch_count_together():
    torch.testing.assert_close(one_step(4), one_step(1))


def test_ranks_count_together(monkeypatch):
    """A second rank is played: it has 90 pixels of class 2 in the union and none in the intersection."""
    other = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 90.0]], dtype=torch.float64)
    alone = one_step(1)
    own = (alone - 0.98 / 3) / 0.02  # shares of this rank's pixels
    seen = []

    def sums(tensor):
        if tensor.shape != other.shape:
            return tensor
        seen.append(tensor)
        return tensor + other

    monkeypatch.setattr(step.distributed, "sum_over_ranks", sums)
    together = one_step(1)
    pixels = float(seen[0].sum()) / 2
    assert len(seen) == 1
    expected = 0.98 / 3 + 0.02 * (own * pixels + other) / (pixels + 45)
    torch.testing.assert_close(together, expected)
