"""The promises of the library, kept by encoders of every family, text and image."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import DENSE, Capacity, Chunk, LayerPlan, Phase, Plan, Unit, UnitShares
from elastiformer.accounting import layer_cost
from elastiformer.calibration import Calibration, Measured, Step
from elastiformer.encoder import Batch, ElasticEncoder
from elastiformer.encoder_families import Pooling
from elastiformer.errors import (
    AdapterError,
    CapacityError,
    InputError,
    UnsupportedModel,
)
from elastiformer.lora import PARTS
from elastiformer.sequence import Item, ItemKinds, Kind, WholeSequence
from tests.elastiformer.elastic import EVERY_UNIT, any_plan
from tests.tiny import tiny
from tests.tiny_encoders import (
    FEATURES_ONLY,
    IMAGE_FAMILIES,
    LAYERS,
    SIDE,
    TEXT_FAMILIES,
    VOCAB,
    own_task,
    tiny_encoder,
)

FAMILIES = (*TEXT_FAMILIES, *IMAGE_FAMILIES)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # float32, other shapes, so other rounding
PLANS = (any_plan(1, LAYERS), any_plan(2, LAYERS))
TEXT_TASKS = ("text-classification", "token-classification", "features")


def items(
    model: ElasticEncoder, lengths: tuple[int, ...] = (9, 17, 4), seed: int = 3
) -> list[Item]:
    draw = torch.Generator().manual_seed(seed)
    if model.encoder.reads_images:
        return [model.image(torch.randn(3, SIDE, SIDE, generator=draw)) for _ in lengths]
    found = []
    for length in lengths:
        ids = (1, *torch.randint(5, VOCAB, (length - 2,), generator=draw).tolist(), 2)
        types = (0,) * (length // 2) + (1,) * (length - length // 2)
        found.append(Item(ids, types if model.encoder.takes_types else None))
    return found


def elastic_encoder(
    family: str = "bert", task: str | None = None, units=EVERY_UNIT, **choices: object
) -> ElasticEncoder:
    """A tiny encoder with an untrained, shaken adapter: no score is near another."""
    model = ElasticEncoder(tiny_encoder(family, task), pooling=choices.pop("pooling", None))
    sample = model.collate(items(model, (20, 20)))
    width = model.layout.layers[0].shape.mlp_width
    settings = {"experts": width // 8, "lora_rank": 2, "calibration_ids": sample, **choices}
    adapter = model.blank_adapter(units, **settings)
    shaken = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=shaken)
    model.attach(adapter)
    return model


def planned(model: ElasticEncoder, item: Item, plans: tuple[Plan, Plan]) -> WholeSequence:
    """A request that runs under the given (prompt plan, output plan)."""
    dense = model._planner.of_whole(DENSE, len(item.ids), model._outputs)
    priced = {
        phase: model._planner.pricing[phase].of(plan)
        for phase, plan in zip(Phase, plans, strict=True)
    }
    first, *others = (Kind(priced[kind.phase], kind.phase) for kind in dense.each)
    return WholeSequence(ItemKinds.of((Kind(first.plan.rooted, first.phase), *others)), item)


def stepped(model: ElasticEncoder, *sequences: WholeSequence) -> list[torch.Tensor]:
    return model.step([Chunk(each, list(each.item.ids)) for each in sequences])


def masked_outputs(model: ElasticEncoder, given: list[Item], plans: tuple[Plan, Plan]):
    """Of each item, what `step` gives, by the masked form over a padded batch."""
    with torch.no_grad():
        outputs = model.masked(model.collate(given), [plans] * len(given)).outputs
    found = []
    for item, output in zip(given, outputs, strict=True):
        if model.task == "features" and model.pooling is not Pooling.OWN:
            output = pooled(model, output[: len(item.ids)])
        elif model.task == "token-classification":
            output = output[: len(item.ids)]
        found.append(output)
    return found


def pooled(model: ElasticEncoder, output: torch.Tensor) -> torch.Tensor:
    """One item's features, [D], from those of its tokens, unless the base pools them itself."""
    if model.pooling is Pooling.OWN:
        return output
    return output[0] if model.pooling is Pooling.CLASS else output.mean(0)


def untouched(family: str, task: str, batch: Batch) -> torch.Tensor:
    """What Transformers' own model says, with the field of its answer that is for this task."""
    base = tiny_encoder(family, task)
    if family == "vit-mae":
        base.config.mask_ratio = 0.0
    said = base(**batch.inputs)
    if task != "features":
        return said.logits
    fields = {"clip": "pooler_output", "siglip": "pooler_output", "clip-projected": "image_embeds"}
    return said[fields.get(family, "last_hidden_state")]


def families_and_tasks() -> list[tuple[str, str]]:
    of_text = [(family, task) for family in TEXT_FAMILIES for task in TEXT_TASKS]
    tasks = ("image-classification", "features")
    of_images = [(family, task) for family in IMAGE_FAMILIES for task in tasks]
    return of_text + [
        (family, task)
        for family, task in of_images
        if task == "features" or family not in FEATURES_ONLY
    ]


# 1. Capacity 1.0 is the pretrained model.


@pytest.mark.parametrize(("family", "task"), families_and_tasks())
def test_at_capacity_one_an_encoder_is_the_pretrained_one(family, task):
    """Bit for bit in the masked form, also padded; to rounding in packed rows."""
    model = elastic_encoder(family, task)
    given = items(model)
    batch = model.collate(given)
    dense = (LayerPlan(),) * LAYERS
    with torch.inference_mode():
        expected = untouched(family, task, batch)
        actual = model.masked(batch, [(dense, dense)] * len(given)).outputs
        packed = model.encode(given, [DENSE] * len(given))
        alone = [model.teacher(model.collate([item]))[0] for item in given]
    assert torch.equal(actual, expected)
    if task == "features":
        alone = [pooled(model, each) for each in alone]
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("family", ["bert", "modernbert", "dinov2", "siglip"])
def test_in_bfloat16_packed_rows_are_near_the_pretrained_model(family):
    """Over several models, off by no more than half more than the pretrained ones themselves are,
    and a tenth of what they say in float32."""
    rights, ours, theirs = [], [], []
    for seed in range(4):
        truth = ElasticEncoder(tiny_encoder(family, seed=seed))
        given = items(truth, seed=seed)
        rough = ElasticEncoder(tiny_encoder(family, seed=seed).to(torch.bfloat16))
        with torch.inference_mode():
            rights += [truth.teacher(truth.collate([item]))[0] for item in given]
            theirs += [rough.teacher(rough.collate([item]))[0].float() for item in given]
            ours += rough.encode(given, [DENSE] * len(given))
    right, our, their = (torch.stack(each) for each in (rights, ours, theirs))
    off = (our - right).norm()
    assert off <= 1.5 * (their - right).norm()
    assert off <= right.norm() / 10


def test_a_text_of_one_token_runs_as_any_other():
    model = ElasticEncoder(tiny_encoder("bert"))
    given = Item((1,))
    (actual,) = model.encode([given], [DENSE])
    torch.testing.assert_close(actual, model.teacher(model.collate([given]))[0], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_router_and_no_repair_runs_for_a_dense_item_beside_a_routed_one(family):
    units = tuple(unit for unit in EVERY_UNIT if unit not in (Unit.HEADS, Unit.EXPERTS))
    model = elastic_encoder(family)
    first, second, _ = items(model)
    (expected,) = model.encode([first], [DENSE])
    for parameter in model.trainable().values():
        parameter.data.fill_(torch.nan)
    routed = planned(model, second, (any_plan(1, LAYERS, units), any_plan(2, LAYERS, units)))
    _, actual = stepped(model, routed, model.sequence(DENSE, first))

    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    ("seen", "share"), [((0, 3, 4, 11, 17, 20, 21, 22, 24, 7), 0.6), (None, 0.0)]
)
def test_a_masked_autoencoder_sees_the_patches_it_is_shown(seen, share):
    """As the base itself, whose noise hides the others; in packed rows too, whatever is shown."""
    model, base = elastic_encoder("vit-mae"), tiny_encoder("vit-mae")
    base.config.mask_ratio = share
    pixels = torch.randn(3, SIDE, SIDE)
    item = model.image(pixels, seen)
    noise = torch.ones(1, 25)
    noise[0, sorted(seen or range(25))] = torch.arange(len(item.ids) - 1) / 25
    with torch.inference_mode():
        expected = base(pixels[None], noise=noise).last_hidden_state
        actual = model.teacher(model.collate([item]))
        packed = model.encode([item, model.image(pixels)], [DENSE, DENSE])

    assert torch.equal(actual, expected)
    assert model.base.config.mask_ratio == 0.6  # as it was
    torch.testing.assert_close(packed[0], expected[0].mean(0), **CLOSE)
    routed = planned(model, item, PLANS)
    torch.testing.assert_close(
        stepped(model, routed)[0], masked_outputs(model, [item], PLANS)[0], **CLOSE
    )


def test_patches_are_hidden_from_masked_autoencoders_alone():
    with pytest.raises(InputError, match="ViTForImageClassification reads whole images"):
        ElasticEncoder(tiny_encoder("vit")).image(torch.randn(3, SIDE, SIDE), [1, 2])


# 2. Skipping is skipping.


@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_usage_counts_what_pytorch_counts(family, kv):
    for task in {own_task(family), "features"}:
        # A repair fused over queries and keys reads twice where queries run apart: not counted.
        fused = family == "modernbert"
        parts = ("out", "up", "down") if fused else PARTS
        model = elastic_encoder(family, task, kv=kv, lora_parts=parts)
        for given in items(model):
            for plans in (PLANS, ((LayerPlan(),) * LAYERS,) * 2):
                sequence = planned(model, given, plans)
                with FlopCounterMode(display=False) as counter:
                    stepped(model, sequence)
                usage = sequence.usage
                assert usage.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
            assert usage.block_flops <= usage.dense_block_flops


def test_token_heads_are_counted_for_every_token():
    model = elastic_encoder("distilbert", "token-classification")
    for given in items(model):
        sequence = planned(model, given, PLANS)
        with FlopCounterMode(display=False) as counter:
            stepped(model, sequence)
        assert sequence.usage.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "read"), [("bert", 1), ("vit", 1), ("deit", 2), ("clip-projected", 1)]
)
def test_what_a_head_does_not_read_is_not_computed_in_the_last_layer(family, read):
    """Nothing of the others, whose keys nobody makes; at capacity 1.0 too."""
    model = elastic_encoder(family)
    given = items(model)[1]
    sequence = model.sequence(DENSE, given)
    stepped(model, sequence)
    layer, tokens = model.shape.layers[-1], len(given.ids)
    whole = layer_cost(layer, LayerPlan(), "complete", True)
    of_class = layer_cost(layer, LayerPlan(), "complete", True, sides=1)
    spared = (tokens - read) * (
        whole.attention_kept + whole.mlp_kept + tokens * whole.attention_per_key
    )
    spared += read * (whole.attention_kept - of_class.attention_kept)
    spared += read * tokens * (whole.attention_per_key - of_class.attention_per_key)

    assert sequence.usage.dense_flops - sequence.usage.flops == spared


# 3. A capacity is kept.


PATH = (
    *(Step(layer, "heads", 0.75) for layer in range(LAYERS)),
    *(Step(layer, "mlp_out", 0.7) for layer in range(LAYERS)),
    *(Step(layer, "attention_tokens", 0.5) for layer in range(LAYERS)),
    *(Step(layer, "experts", 5 / 7) for layer in range(LAYERS)),
    *(Step(layer, "mlp_tokens", 0.25) for layer in range(LAYERS)),
)


def calibrated(model: ElasticEncoder) -> ElasticEncoder:
    model.adapter.calibration = Calibration(
        lowest=0.5,
        context=32,
        paths=dict.fromkeys(Phase, PATH),
        thresholds={},
        measured=(Measured(1.0, 1.0), Measured(0.5, 0.5)),
    )
    model.attach(model.adapter)
    return model


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit"])
@pytest.mark.parametrize("task", ["features", None])
def test_a_capacity_is_kept(family, task):
    """For 128 tokens and more within 0.02: of tokens the exact number is kept."""
    sizes = {"image_size": 4 * 12} if family == "vit" else {"max_position_embeddings": 160}
    model = ElasticEncoder(tiny_encoder(family, task, **sizes), pooling=None)
    adapter = model.blank_adapter(EVERY_UNIT, experts=7, expert_split="contiguous", lora_rank=1)
    model.attach(adapter)
    calibrated(model)
    if family == "vit":
        given = model.image(torch.randn(3, 48, 48))
    else:
        given = Item((1, *torch.randint(5, VOCAB, (140,)).tolist(), 2))
    for capacity in (0.9, 0.73, 0.6, 0.5):
        sequence = model.sequence(Capacity(capacity, capacity), given)
        stepped(model, sequence)
        spent = sequence.usage.capacity_spent
        assert spent <= capacity + 0.02
        assert spent >= capacity - 0.02 or spent >= 0.98 * _most_spendable(model, given)


def _most_spendable(model: ElasticEncoder, given: Item) -> float:
    dense = model.sequence(DENSE, given)
    stepped(model, dense)
    return dense.usage.capacity_spent


def test_of_tokens_exactly_the_asked_share_is_kept():
    """In every layer the number due to the request, rounded once; the first token never skips."""
    model = elastic_encoder("bert", "features", units=(Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS))
    for length in (5, 8, 21, 40):
        (given,) = items(model, (length,))
        for share in (0.25, 0.5, 0.8):
            asked = UnitShares(attention_tokens=share, mlp_tokens=share)
            sequence = model.sequence(Capacity(asked, asked), given)
            stepped(model, sequence)
            left = length - 1 - round(share * (length - 1))
            for unit in (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS):
                assert sequence.usage.unit_skipped(unit) == LAYERS * left


def test_without_a_calibration_only_capacity_one_and_keep_shares_can_be_asked():
    model = ElasticEncoder(tiny_encoder("bert"))
    given = items(model)[0]
    assert model.lowest == 1.0
    with pytest.raises(CapacityError, match=r"no calibration, so only 1\.0"):
        model.sequence(Capacity(0.7, 0.7), given)
    with pytest.raises(CapacityError, match="no routers for heads"):
        model.sequence(Capacity(UnitShares(heads=0.5), 1.0), given)
    shares = UnitShares(mlp_tokens=0.5, channels=0.8)
    sequence = model.sequence(Capacity(shares, shares), given)
    stepped(model, sequence)
    assert sequence.usage.unit_skipped(Unit.MLP_TOKENS) > 0


# 5. Batch-mates do not change each other. 6. Masked = sparse.


@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize(("family", "task"), families_and_tasks())
def test_an_item_is_the_same_alone_in_a_mix_and_in_the_masked_form(family, task, kv):
    model = elastic_encoder(family, task, kv=kv)
    given = items(model)
    expected = masked_outputs(model, given, PLANS)
    other = (any_plan(7, LAYERS), any_plan(8, LAYERS))
    mates = [planned(model, item, other) for item in items(model, (12, 6), seed=9)]
    mates.append(model.sequence(DENSE, given[0]))
    sequences = [planned(model, item, PLANS) for item in given]
    together = stepped(model, mates[0], sequences[0], mates[1], *sequences[1:], mates[2])
    mixed = [together[1], *together[3:5]]
    for item, one, masked, sequence in zip(given, mixed, expected, sequences, strict=True):
        alone = planned(model, item, PLANS)
        torch.testing.assert_close(one, stepped(model, alone)[0], **CLOSE)
        torch.testing.assert_close(one, masked, **CLOSE)
        assert alone.usage == sequence.usage


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize(("token_gate", "part_gate"), [("sigmoid", "softmax"), ("raw", "mean")])
def test_gates_are_the_same_in_both_forms(family, token_gate, part_gate):
    model = elastic_encoder(family, token_gate=token_gate, part_gate=part_gate)
    given = items(model)
    expected = masked_outputs(model, given, PLANS)
    actual = stepped(model, *(planned(model, item, PLANS) for item in given))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_gets_a_gradient_and_the_base_none(family):
    model = elastic_encoder(family)
    outputs = model.masked(model.collate(items(model)), [PLANS] * 3).outputs
    outputs.square().sum().backward()
    with_gradient = {name for name, p in model.trainable().items() if p.grad is not None}

    assert any(name.startswith("routers") for name in with_gradient)
    assert any(name.startswith("lora") for name in with_gradient)
    assert not any(p.requires_grad for p in model.base.parameters())


# What is refused, and what comes back from disk.


def test_a_saved_adapter_gives_the_same_outputs_and_says_its_task(tmp_path):
    from elastiformer import SavedAdapter

    model = elastic_encoder("bert")
    given = items(model)
    expected = stepped(model, *(planned(model, item, PLANS) for item in given))
    model.adapter.save(tmp_path / "adapter")
    saved = SavedAdapter.load(tmp_path / "adapter")
    again = ElasticEncoder(tiny_encoder("bert"))
    again.attach(saved.fit(again.layout, again.identity))
    actual = stepped(again, *(planned(again, item, PLANS) for item in given))

    assert saved.spec.task == "text-classification"
    assert all(map(torch.equal, actual, expected))
    other = ElasticEncoder(tiny_encoder("bert", "features"))
    with pytest.raises(AdapterError, match=r"made for text-classification.*task is features"):
        other.attach(saved.fit(other.layout, again.identity))


def test_a_text_beyond_the_position_table_is_refused_with_the_bound():
    model = ElasticEncoder(tiny_encoder("roberta"))
    with pytest.raises(InputError, match="60 tokens; this model takes 1 to 48"):
        model.sequence(DENSE, Item((1,) * 60))


def test_an_architecture_without_an_entry_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"LlamaModel has no entry.*BertModel"):
        ElasticEncoder(tiny("llama"))


@pytest.mark.parametrize("family", ["bert", "vit", "deit"])
def test_under_one_number_the_class_token_runs_whole_and_the_mean_is_what_was_asked(family):
    model = calibrated(elastic_encoder(family, lora_rank=0))
    given = items(model, (40,))[0]
    for capacity in (0.8, 0.6, 0.52):
        sequence = model.sequence(Capacity(capacity, capacity), given)
        stepped(model, sequence)
        outputs = [sequence.run_at(at) for at in range(model.encoder.class_tokens)]
        assert all(plan.is_dense for plan in outputs)
        expected = min(capacity, _most_spendable(model, given))
        assert sequence.usage.capacity_spent == pytest.approx(expected, abs=1 / len(given.ids))


def test_at_half_the_lowest_capacity_a_request_is_refused_with_the_range():
    model = calibrated(elastic_encoder("bert", "features"))
    with pytest.raises(CapacityError, match=r"below the calibrated range 0\.50"):
        model.sequence(Capacity(0.25, 0.25), items(model)[1])
