"""A base over two processes says, skips and spends what it does in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.models import routed_tokens
from elastiformer import ElasticModel
from elastiformer.errors import BaseModelError
from elastiformer.sharded import ShardedModel
from tests.devices import cpu_only
from tests.tiny import tiny

pytestmark = cpu_only  # where processes without a device of their own sum by Gloo

ROOT = Path(__file__).parents[2]
FAMILIES = ("llama", "qwen2", "gemma2")  # plain; biases and tied weights; norms on the branches

PROGRAM = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from elastiformer import Capacity, Chunk, ElasticModel, Unit, UnitShares
from elastiformer.errors import ElastiError
from elastiformer.sharded import ShardedModel

def run(model, capacity):
    ids = [7 * place % 250 for place in range(46)]
    sequence = model.sequence(capacity, prompt_tokens=40, most_tokens=46)
    parts = [ids[:15], ids[15:40], *([each] for each in ids[40:])]
    logits = [row for part in parts for row in model.step([Chunk(sequence, part)])]
    return torch.cat(logits), sequence.usage

folder, seen = Path(sys.argv[1]), {}
torch.set_num_threads(1)
dist.init_process_group("gloo")
for family in sys.argv[2:]:
    given = dict(adapter=folder / f"{family}-adapter", dtype="float32", device="cpu")
    one = ElasticModel.load(str(folder / family), **given)
    two = ShardedModel.load(str(folder / family), **given)
    two.open_cache(256)
    for share in (1.0, 0.6):
        capacity = Capacity(share, share)
        (expected, usage), (got, spent) = run(one, capacity), run(two, capacity)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert spent == usage, (spent, usage)
        seen[f"{family} {share}"] = usage.unit_skipped(Unit.MLP_TOKENS)
    one.open_cache(256)
    assert 2 * two.cache.rows.nbytes == one.cache.rows.nbytes
    assert two.identity == one.identity
    refused = two.blank_adapter([Unit.HEADS, Unit.MLP_TOKENS], lora_rank=0), two.blank_adapter([])
    for adapter in refused:
        try:
            two.attach(adapter)
        except ElastiError as error:
            seen[str(error)] = seen.get(str(error), 0) + 1
try:
    ShardedModel.load(str(folder / "odd"), dtype="float32", device="cpu").attach(None)
except ElastiError as error:
    seen[str(error)] = 1
if dist.get_rank() == 0:
    print(json.dumps(seen))
dist.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path):
    for family in FAMILIES:
        tiny(family, vocab_size=260).save_pretrained(tmp_path / family)
        model = ElasticModel.load(str(tmp_path / family), dtype="float32", device="cpu")
        routed_tokens(model, kv="complete")
        model.adapter.save(tmp_path / f"{family}-adapter")
    tiny(vocab_size=260, num_attention_heads=3, num_key_value_heads=3).save_pretrained(
        tmp_path / "odd"
    )
    return tmp_path


def test_processes_use_the_accelerator_or_are_told_to_hide_it(tmp_path, monkeypatch):
    """Transformers puts their parts there, whatever device they name."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    refusal = r"'cpu' cannot be used by 2 processes: .* 'cuda'\. Hide it .*CUDA_VISIBLE_DEVICES="
    with pytest.raises(BaseModelError, match=refusal):
        ShardedModel.load(str(tmp_path), device="cpu")


def test_two_processes_compute_skip_and_spend_what_one_does(folder):
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(folder / "program.py"), str(folder), *FAMILIES],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    for family in FAMILIES:
        assert seen[f"{family} 1.0"] == 0 < seen[f"{family} 0.6"]
    assert any("also routes heads" in told and seen[told] == len(FAMILIES) for told in seen)
    assert any("repair (LoRA)" in told and seen[told] == len(FAMILIES) for told in seen)
    assert any("3 heads of layer 0 do not divide among 2 processes" in told for told in seen)
