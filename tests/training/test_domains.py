"""Routers of one domain on another: the command, what it compares, and what it says of it."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from elastiformer import Calibration, Capacity, Chunk, ElasticModel, Phase, Unit
from tests.elastiformer.test_encoders import elastic_encoder, items
from tests.tiny_encoders import LAYERS, save_tiny_encoder, tiny_encoder
from tests.training.test_calibrate import prose
from tests.training.test_encoders import pictures, ran
from training.allotment import uniform
from training.domain_data import write_domains
from training.domain_report import UNTRAINED, Cell, Overlap, Robustness
from training.domains import domain
from training.encoder_calibrate import uniform_calibration
from training.files import DataError
from training.overlap import Choice, by_chance, choice_of, choice_of_texts, jaccard
from training.quality import recalibrate


@pytest.fixture
def images(tmp_path):
    """Images on disk and a list of them, with a label and a kind each."""
    folder = pictures(tmp_path / "images", 24)
    lines = [
        {"image": str(path.relative_to(folder)), "label": path.parent.name, "kind": place % 2}
        for place, path in enumerate(sorted(folder.rglob("*.png")))
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "list.jsonl"


def test_routers_of_every_domain_are_measured_on_every_other(tmp_path, capsys, images):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("vit"))
    given = ["--base", base, "--data", images, "--test", images, "--out", tmp_path / "report"]
    given += ["--domain", "rows=label 0", "--domain", "columns=label 1", "--capacities", "0.8,0.6"]
    given += ["--seeds", 2, "--batch-items", 4]
    said = ran(capsys, "domains", *given, "--steps", 2)
    assert said["finished"] and said["sentence"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["cells"]) == (3 + 1) * 2 * 2 * 2  # trainings, seeds, domains, capacities
    assert len(report["overlaps"]) == 2 * (8 * 7 // 2)
    assert all(cell["spent"] <= cell["capacity"] + 0.02 for cell in report["cells"])
    assert {cell["trained_on"] for cell in report["cells"]} == {"rows", "columns", "all", UNTRAINED}
    assert "| 0.6 | rows |" in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "domains.png").stat().st_size > 10_000

    adapters = sorted((tmp_path / "report.run").glob("*/adapter.json"))
    before = [path.stat().st_mtime_ns for path in adapters]
    assert len(before) == 6
    again = ran(capsys, "domains", *given, "--steps", 2)
    assert again["sentence"] == said["sentence"]
    assert [path.stat().st_mtime_ns for path in adapters] == before  # nothing was trained again
    with pytest.raises(AssertionError):
        ran(capsys, "domains", *given, "--steps", 3)
    assert "holds a run with another steps" in capsys.readouterr().err


def test_routers_of_a_language_model_are_measured_on_every_domain_of_text(
    tmp_path, capsys, tiny_folder
):
    lines = [
        json.dumps(json.loads(line) | {"domain": name})
        for name, seed in (("prose", 0), ("chat", 1))
        for line in prose(seed=seed, documents=8 if name == "prose" else 6).splitlines()
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    given = ["--base", tiny_folder, "--data", tmp_path / "texts.jsonl"]
    given += ["--test", tmp_path / "texts.jsonl", "--out", tmp_path / "report", "--by", "domain"]
    given += ["--domain", "prose=prose", "--domain", "chat=chat", "--seeds", 2, "--steps", 2]
    given += ["--batch-tokens", 64, "--window", 32, "--held-out-window", 32]
    given += ["--units", "mlp_tokens,heads", "--capacities", "0.8"]
    said = ran(capsys, "domains", *given, "--windows", 2)
    assert said["finished"] and said["sentence"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["cells"]) == (3 + 1) * 2 * 2  # trainings, seeds, domains
    assert all(abs(cell["spent"] - 0.8) < 0.05 for cell in report["cells"])
    assert all(0 <= cell["same"] <= 1 and cell["accuracy"] is None for cell in report["cells"])
    losses = {(cell["trained_on"], cell["distance"]) for cell in report["cells"]}
    assert len(losses) == len(report["cells"])  # every training is one of its own
    assert len(report["overlaps"]) == 8 * 7 // 2
    held = report["about"]["trained_on"]
    assert held["prose"] <= held["chat"] and held["all"] == held["prose"] + held["chat"]
    written = (tmp_path / "report" / "report.md").read_text()
    assert "## KL to the full model, nats per token" in written
    assert "## Tokens and heads kept by both" in written
    assert "--domain prose=prose --domain chat=chat --by domain --out report" in written
    assert "--capacities 1,0.8" in written and str(tmp_path) not in written

    with pytest.raises(AssertionError):
        ran(capsys, "domains", *given, "--windows", 99)
    assert "windows of 32 tokens; 99 are wanted" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        ran(capsys, "domains", *given, "--items", 9)
    assert "--items: a language model has no use for it" in capsys.readouterr().err


def test_a_line_goes_to_its_own_domain_and_to_all(tmp_path, images):
    counts = write_domains(images, {"even": ["0"], "odd": ["1"]}, "kind", tmp_path / "parts")
    assert counts == {"even": 12, "odd": 12, "all": 24}
    (first, *_) = (tmp_path / "parts" / "odd.jsonl").read_text().splitlines()
    assert json.loads(first)["kind"] == 1
    assert (tmp_path / json.loads(first)["image"]).is_file()  # wherever the part stands
    uneven = {"many": ["0"], "few": ["1"]}
    lines = images.read_text().splitlines()
    (images.parent / "uneven.jsonl").write_text("\n".join(lines[:9] + lines[9::2]))
    counts = write_domains(
        images.parent / "uneven.jsonl", uneven, "kind", tmp_path / "parts", alike=True
    )
    assert counts["many"] == counts["few"] and counts["all"] == 2 * counts["few"]
    with pytest.raises(DataError, match='line 1: an object with "colour"'):
        write_domains(images, {"even": ["0"], "odd": ["1"]}, "colour", tmp_path / "parts")
    with pytest.raises(DataError, match=r"fewer than 2 lines of none \(kind: 7\)"):
        write_domains(images, {"none": ["7"], "odd": ["1"]}, "kind", tmp_path / "parts")
    with pytest.raises(DataError, match="cannot be read"):
        write_domains(tmp_path / "gone", {"even": ["0"]}, "kind", tmp_path / "parts")


@pytest.mark.parametrize("text", ["tops", "tops=", "=a", "all=a", "a b=c"])
def test_a_domain_has_a_name_and_values(text):
    assert domain("tops=Shirt, T-shirt/top") == ("tops", ("Shirt", "T-shirt/top"))
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
        domain(text)


@pytest.mark.parametrize(
    ("second", "told"), [("other=x,a", "a: in two domains"), ("one=x", "each of its own name")]
)
def test_domains_that_are_not_apart_are_refused(tmp_path, capsys, images, second, told):
    given = ["--base", "none", "--data", images, "--test", images, "--out", tmp_path / "report"]
    with pytest.raises(AssertionError):
        ran(capsys, "domains", *given, "--domain", "one=a,b", "--domain", second)
    assert told in capsys.readouterr().err


# What is compared.


@pytest.mark.parametrize("family", ["bert", "vit", "siglip"])
def test_the_tokens_compared_are_those_that_serving_keeps(family):
    units = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)
    model = elastic_encoder(family, "features", units=units)
    recalibrate(model, uniform_calibration(model, 20))
    given = items(model, (20, 31, 26))
    for capacity in (0.8, 0.6):
        sequences = [model.sequence(Capacity(capacity, capacity), item) for item in given]
        model.step([Chunk(each, list(each.item.ids)) for each in sequences])
        skipped = sum(each.usage.unit_skipped(unit) for each in sequences for unit in units)
        choice = choice_of(model, given, capacity)
        left_out = [int((a & ~k).sum()) for k, a in zip(choice.kept, choice.asked, strict=True)]
        if model.reads_class:  # the last layer's are nobody's choice
            assert len(choice.kept) <= 2 * (LAYERS - 1) and sum(left_out) <= skipped
        else:
            assert sum(left_out) == skipped > 0
        assert jaccard(choice, choice) == 1.0


def test_overlap_is_what_a_hand_counts():
    asked = torch.tensor([[False, True, True, True, True]])
    one = Choice((torch.tensor([[False, True, True, False, False]]),), (asked,))
    other = Choice((torch.tensor([[False, False, True, True, False]]),), (asked,))
    assert jaccard(one, other) == pytest.approx(1 / 3)
    assert by_chance(one) == pytest.approx(0.5 / 1.5)


def test_the_tokens_and_heads_of_texts_compared_are_those_that_serving_keeps(tiny_llama):
    units = (Unit.MLP_TOKENS, Unit.HEADS)
    model = ElasticModel(tiny_llama)
    torch.manual_seed(0)
    model.attach(model.blank_adapter(units, lora_rank=0))
    path = uniform(model.shape, units)
    calibration = Calibration(0.01, 40, dict.fromkeys(Phase, path), {}, ())
    recalibrate(model, calibration)
    ids_NT = torch.randint(5, 90, (2, 40))
    choice = choice_of_texts(model, ids_NT, 0.8)
    served: dict[Unit, float] = dict.fromkeys(units, 0)
    for ids in ids_NT.tolist():
        sequence = model.sequence(Capacity(0.8, 0.8), 40, 40, scored=True)
        model.step([Chunk(sequence, ids)])
        for unit in units:
            served[unit] += sequence.usage.unit_skipped(unit)
        sequence.release()
    skipped = [int((a & ~k).sum()) for k, a in zip(choice.kept, choice.asked, strict=True)]
    of_tokens = [each.shape[1] == 40 for each in choice.kept]
    assert (
        sum(n for n, is_token in zip(skipped, of_tokens, strict=True) if is_token)
        == (served[Unit.MLP_TOKENS])
    )
    assert any(of_tokens) and not all(of_tokens)
    assert 0 < by_chance(choice) < jaccard(choice, choice) == 1.0


# What it says.


def found(cross: float, untrained: float = 1.0) -> Robustness:
    """Two domains: 0.2 at home, `cross` away from it."""
    distances = {
        (trained, measured): 0.2 if trained in (measured, "all") else cross
        for trained in ("a", "b", "all")
        for measured in ("a", "b")
    } | {(UNTRAINED, measured): untrained for measured in ("a", "b")}
    cells = [
        Cell(trained, seed, measured, 0.5, distance + 0.1 * seed - 0.05, None, 1 - distance, 0.5)
        for (trained, measured), distance in distances.items()
        for seed in (0, 1)
    ]
    overlaps = [
        Overlap("a", 0, "b", 0, 0.5, 0.9, 0.3),  # of one seed: does not count
        Overlap("a", 0, "b", 1, 0.5, 0.6, 0.3),
        Overlap("b", 0, "a", 1, 0.5, 0.5, 0.3),
    ]
    about = {"task": "image-classification"}
    return Robustness(about, ["a", "b"], "all", cells, overlaps)


@pytest.mark.parametrize(
    ("cross", "share", "verdict"),
    [(0.2, 1.0, "holds here"), (0.4, 0.75, "holds in part"), (0.84, 0.2, "fails")],
)
def test_the_sentence_follows_from_what_is_kept_of_the_gain(cross, share, verdict):
    report = found(cross)
    assert [each.share for each in report.kept()] == pytest.approx([share, share])
    assert f"The claim {verdict}" in report.sentence()
    assert f"{share:.0%} on the mean" in report.sentence()
    assert f"at most {100 * (cross - 0.2):.1f} points lower" in report.sentence()
    assert report.mean("a", "all", 0.5, "distance") == pytest.approx((0.2 + cross) / 2)
    assert f"on the mean ({share:.0%} at 0.5)" in report.sentence()
    assert report.sentence().endswith("all together keeps 100% on the mean.")
    assert report.jaccard("b", "a", 0.5) == pytest.approx(0.55)
    assert report.alike(0.5) == "of two 0.550, by chance 0.300"


def test_where_training_gained_nothing_the_sentence_says_so():
    assert found(0.3, untrained=0.1).sentence().startswith("Not decided")
