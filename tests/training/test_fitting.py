"""Fitting a small model: resumption to the same bits, and what a run refuses."""

import signal

import pytest
import torch
from torch import nn

from training.files import RunError
from training.fitting import Schedule, Stopped, fit, optimizers_of


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)  # its running mean is state, too
        self.head = nn.Linear(5, 3)

    def loss(self, step: int) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 6, generator=drawn), torch.randint(3, (8,), generator=drawn)
        logits = self.head(self.norm(self.inner(x)).relu())
        return {"total": nn.functional.cross_entropy(logits, y)}


def begin(folder, steps=12, stop_at=None, options=None):
    model = Small()
    optimizers = optimizers_of(dict(model.named_parameters()), 0.02, 0.01, decay=0.1)

    def loss(step):
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return model.loss(step)

    schedule = Schedule(steps, checkpoint_every=5)
    fit("small", model, optimizers, loss, schedule, folder, options or {"lr": 0.02})
    return model


def test_muon_has_the_inner_matrices_and_adamw_the_rest():
    muon, adamw = optimizers_of(dict(Small().named_parameters()), 0.02, 0.01, decay=0.1)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [tuple(each.shape) for each in muon.param_groups[0]["params"]] == [(5, 6)]
    assert len(adamw.param_groups[0]["params"]) == 5


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole = begin(tmp_path / "whole").state_dict()
    with pytest.raises(Stopped) as stopped:
        begin(tmp_path / "parts", stop_at=7)
    assert stopped.value.done.steps == 8  # the step it was told in is ended
    resumed = begin(tmp_path / "parts").state_dict()

    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not torch.equal(whole["inner.weight"], Small().inner.weight)


def test_a_run_of_other_options_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(RunError, match="holds a run with other options"):
        begin(tmp_path, options={"lr": 0.5})


def test_the_rate_rises_falls_and_ends_near_zero():
    schedule = Schedule(100, warmup=0.1)
    shares = [schedule.share(step) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0 < shares[-1] < 0.02
