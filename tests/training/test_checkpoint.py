"""Checkpoints: whole or absent, exact, and readable without pickle."""

import pytest
import torch

from training.checkpoint import (
    Checkpoint,
    copy_weights,
    latest_checkpoint,
    read_moments,
    remove_checkpoints,
    save_checkpoint,
    write_moments,
)
from training.files import RunError


def checkpoint(step, **weights):
    return Checkpoint(step, {"position": [0, step]}, weights, {"a:step": torch.tensor(1.0)})


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    weight = torch.randn(3, 5) * 1e-30

    save_checkpoint(tmp_path, checkpoint(7, weight=weight))
    found = latest_checkpoint(tmp_path)

    assert found.step == 7
    assert found.state == {"position": [0, 7]}
    assert torch.equal(found.weights["weight"], weight)


def test_the_one_before_goes_only_when_the_next_is_whole(tmp_path):
    save_checkpoint(tmp_path, checkpoint(9))
    half = tmp_path / ".step-0000010.part"  # a run killed while it wrote
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")

    assert latest_checkpoint(tmp_path).step == 9

    save_checkpoint(tmp_path, checkpoint(10))
    assert latest_checkpoint(tmp_path).step == 10
    assert [each.name for each in tmp_path.iterdir()] == ["step-0000010"]


def test_no_checkpoint_is_none_and_a_damaged_one_is_named(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None

    path = save_checkpoint(tmp_path, checkpoint(1, weight=torch.ones(9)))
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])

    with pytest.raises(RunError, match="step-0000001 cannot be read"):
        latest_checkpoint(tmp_path)


def test_removing_leaves_other_files_alone(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "progress.jsonl").write_text("")

    remove_checkpoints(tmp_path)

    assert [each.name for each in tmp_path.iterdir()] == ["progress.jsonl"]


def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path):
    def fresh():
        torch.manual_seed(5)
        parameters = {
            "a": torch.nn.Parameter(torch.randn(4, 3)),
            "b": torch.nn.Parameter(torch.ones(2)),
        }
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)

    def train(parameters, optimizer, steps):
        for step in steps:
            for parameter in parameters.values():
                parameter.grad = (parameter.detach() * (step + 1)).sin()
            optimizer.step()

    whole, optimizer = fresh()
    train(whole, optimizer, range(6))

    first, optimizer = fresh()
    train(first, optimizer, range(4))
    save_checkpoint(tmp_path, Checkpoint(4, {}, first, read_moments(optimizer, first)))
    found = latest_checkpoint(tmp_path)
    second, optimizer = fresh()
    copy_weights(second, found.weights)
    write_moments(optimizer, second, found.moments)
    train(second, optimizer, range(4, 6))

    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_every_misfit_of_a_checkpoint_is_named_at_once():
    with pytest.raises(RunError) as refused:
        copy_weights(
            {"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.zeros(4), "c": torch.zeros(1)}
        )

    for fault in ("a: saved (4,)", "b: missing", "c: not of this run"):
        assert fault in str(refused.value)
