"""Vision-language models: the pretrained one at capacity 1.0, image tokens left out below."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import (
    DENSE,
    Calibration,
    Capacity,
    CapacityError,
    Chunk,
    InputError,
    LayerPlan,
    Phase,
    SavedAdapter,
    Unit,
    UnsupportedModel,
    dense_plan,
)
from elastiformer.capacity import UnitShares
from elastiformer.errors import AdapterError
from elastiformer.model import ElasticModel
from elastiformer.picture_inputs import picture_of
from elastiformer.plan_grid import Selection
from elastiformer.vlm import ElasticVlm, ImagedBatch
from elastiformer.vlms import describe_vlm
from tests.elastiformer.sighted import (
    BEFORE,
    CLOSE,
    HALF,
    NEW,
    asked,
    batch_of,
    elastic,
    ids_of,
    pixels,
    routed,
    run,
)
from tests.tiny import CONTEXT, LAYERS, tiny
from tests.tiny_vlms import (
    PATCHES,
    TOWERS,
    save_tiny_vlm,
    tiny_aya_vlm,
    tiny_vip_vlm,
    tiny_vlm,
    tiny_vlm_processor,
)


def pretrained(tower: str, language: str, batch: ImagedBatch) -> torch.Tensor:
    """What Transformers' own model says of the last prompt token and those after it."""
    with torch.inference_mode():
        logits = tiny_vlm(tower, language)(
            input_ids=batch.ids_BT, pixel_values=batch.pixels_NCHW
        ).logits
    return logits[batch.output_BT]


# Capacity 1.0 is the pretrained model.


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", ["llama", "mistral", "gemma2", "gemma3"])
def test_packed_rows_at_capacity_1_are_the_pretrained_model_to_rounding(tower, language):
    model = elastic(tower, language)
    expected = pretrained(tower, language, batch_of(2))
    sequence, actual = run(model, asked(model, DENSE, images=2), cuts=(5, 21))
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert sequence.usage.routed == {}


@pytest.mark.parametrize("tower", ["clip", "vit"])
@pytest.mark.parametrize("made", [tiny_vip_vlm, tiny_aya_vlm])
def test_other_features_and_projectors_are_the_pretrained_models(made, tower):
    """ViP-LLaVA reads several layers of its tower; Aya Vision makes one token of four patches."""
    model, batch = routed(made(tower)), batch_of(2)
    with torch.inference_mode():
        expected = made(tower)(input_ids=batch.ids_BT, pixel_values=batch.pixels_NCHW).logits
        masked = model.masked_images(batch, [(dense_plan(LAYERS), dense_plan(LAYERS))])
        few = model.masked_images(batch, [(dense_plan(LAYERS), dense_plan(LAYERS))], shares=0.4)
    assert torch.equal(masked.logits_BSV, expected)
    _, actual = run(model, asked(model, DENSE, images=2), cuts=(5, 21))
    torch.testing.assert_close(actual, expected[batch.output_BT], **CLOSE)
    _, actual = run(model, asked(model, HALF, images=2), cuts=(9,))
    output_BS = batch.output_BT.gather(1, few.original_BS)
    torch.testing.assert_close(actual, few.logits_BSV[output_BS], **CLOSE)


@pytest.mark.parametrize("made", [tiny_vip_vlm, tiny_aya_vlm])
def test_what_is_like_llava_loads_from_a_folder(made, tmp_path):
    save_tiny_vlm(tmp_path / "base", made())
    model = ElasticVlm.load(str(tmp_path / "base"), dtype="float32", device="cpu")
    _, expected = run(routed(made()), asked(model, DENSE))
    _, actual = run(model, asked(model, DENSE))
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masked_form_at_capacity_1_is_the_pretrained_model_bit_for_bit(dtype):
    model, batch = elastic(), batch_of(2)
    model.vlm.whole.to(dtype)
    given = ImagedBatch(batch.ids_BT, batch.pixels_NCHW.to(dtype), batch.mask_BT, batch.output_BT)
    with torch.inference_mode():
        expected = (
            tiny_vlm()
            .to(dtype)(
                input_ids=given.ids_BT, pixel_values=given.pixels_NCHW, attention_mask=given.mask_BT
            )
            .logits
        )
        actual = model.masked_images(given, [(dense_plan(LAYERS), dense_plan(LAYERS))])
        assert torch.equal(model.teacher_images(given), expected)
    assert torch.equal(actual.logits_BSV, expected)


def test_no_router_runs_for_a_dense_prompt_beside_a_routed_one():
    model = elastic()
    _, expected = run(model, asked(model, DENSE))
    for parameter in model.trainable().values():
        parameter.data.fill_(torch.nan)
    dense = asked(model, DENSE)
    whole, routed = model.imaged_sequence(dense, 1), model.imaged_sequence(asked(model, HALF), 1)
    logits = model.step([Chunk(routed, list(routed.imaged.ids)), Chunk(whole, list(dense.ids))])
    torch.testing.assert_close(logits[1], expected[:1], **CLOSE)


# Image tokens are left out.


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
@pytest.mark.parametrize("language", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("images", [1, 2])
def test_masked_and_sparse_agree(scorer, language, images):
    model = elastic("vit", language, scorer)
    _, actual = run(model, asked(model, HALF, images), cuts=(9,))
    batch = batch_of(images)
    with torch.inference_mode():
        found = model.masked_images(batch, [(dense_plan(LAYERS), dense_plan(LAYERS))], shares=0.4)
    output_BS = batch.output_BT.gather(1, found.original_BS)
    torch.testing.assert_close(actual, found.logits_BSV[output_BS], **CLOSE)


@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_masked_and_sparse_agree_where_gates_scale_the_features(gate):
    model = elastic(token_gate=gate)
    _, actual = run(model, asked(model, HALF))
    batch = batch_of()
    with torch.inference_mode():
        found = model.masked_images(batch, [(dense_plan(LAYERS), dense_plan(LAYERS))], shares=0.4)
        hard = elastic().masked_images(batch, [(dense_plan(LAYERS), dense_plan(LAYERS))], 0.4)
    output_BS = batch.output_BT.gather(1, found.original_BS)
    torch.testing.assert_close(actual, found.logits_BSV[output_BS], **CLOSE)
    assert not torch.allclose(found.logits_BSV, hard.logits_BSV, atol=1e-3)


def test_the_language_models_units_join_in_and_both_forms_agree():
    model = elastic()
    shares = UnitShares(image_tokens=0.4, attention_tokens=0.6, heads=0.5, channels=0.7)
    sequence, actual = run(model, asked(model, Capacity(shares, shares)))
    plan = (shares.layer_plan(),) * LAYERS
    batch = batch_of()
    with torch.inference_mode():
        found = model.masked_images(batch, [(plan, plan)], 0.4, Selection.THRESHOLD)
    output_BS = batch.output_BT.gather(1, found.original_BS)
    torch.testing.assert_close(actual, found.logits_BSV[output_BS], **CLOSE)
    assert {unit for unit, _ in sequence.usage.routed} >= {Unit.IMAGE_TOKENS, Unit.HEADS}


def test_exactly_the_share_stays_the_best_in_order_at_the_positions_they_had():
    model, batch = elastic(), batch_of()
    with torch.inference_mode():
        found = model.masked_images(batch, [(dense_plan(LAYERS), dense_plan(LAYERS))], shares=0.4)
        scores_P = model.adapter.routers.image(model.vlm.features(batch.pixels_NCHW))[0]
    best = sorted(scores_P.topk(10).indices.tolist())
    first = len(BEFORE)
    expected = [*range(first), *(first + at for at in best), *range(first + PATCHES, 36)]
    assert found.original_BS[0].tolist() == expected

    prompt = asked(model, HALF)
    sequence = model.imaged_sequence(prompt, 1)
    assert len(prompt.ids) == len(ids_of()) - PATCHES + 10
    model.sight.see([sequence], model.adapter)
    originals = [sequence.original(place) for place in range(len(prompt.ids) + 2)]
    assert originals == [*expected[: len(prompt.ids)], 33, 34]


def test_the_cache_is_shorter_and_usage_counts_what_was_dropped():
    model = elastic()
    whole, _ = run(model, asked(model, DENSE))
    sequence, _ = run(model, asked(model, HALF))
    usage = sequence.usage
    assert sequence.length == whole.length - 15
    assert usage.routed == {(Unit.IMAGE_TOKENS, Phase.PROMPT): PATCHES}
    assert usage.skipped == {(Unit.IMAGE_TOKENS, Phase.PROMPT): PATCHES - 10}
    assert usage.dense_block_flops == whole.usage.dense_block_flops
    assert usage.dense_flops == whole.usage.dense_flops
    assert usage.block_flops < 0.75 * whole.usage.block_flops


@pytest.mark.parametrize("cuts", [(2,), (3,), (5,), (13,), (14,), (4, 4, 4)])
@pytest.mark.parametrize("capacity", [DENSE, HALF])
def test_a_prompt_in_parts_is_the_prompt_in_one(cuts, capacity):
    model = elastic()
    one, expected = run(model, asked(model, capacity))
    parts, actual = run(model, asked(model, capacity), cuts)
    torch.testing.assert_close(actual, expected, **CLOSE)
    # The dense model is charged for the same tokens, however the prompt is cut.
    per_token = model.shape.dense_token_flops(0)
    keys = model.shape.dense_token_flops(1) - per_token
    tokens = len(ids_of())
    new = sum(per_token + (tokens + 1 + at) * keys for at in range(len(NEW)))
    assert one.usage.dense_block_flops == tokens * (per_token + tokens * keys) + new
    linear = parts.usage.dense_block_flops // keys - one.usage.dense_block_flops // keys
    assert linear <= 0  # shorter rectangles of scores, and nothing else
    assert (one.usage.dense_block_flops - parts.usage.dense_block_flops) % keys == 0


@pytest.mark.parametrize("capacity", [DENSE, HALF])
def test_usage_is_what_the_flop_counter_counts(capacity):
    model = elastic()
    prompt = asked(model, capacity, images=2)
    assert model.sight.flops > 0
    with FlopCounterMode(display=False) as counter:
        sequence, _ = run(model, prompt)
    assert sequence.usage.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_batch_mates_do_not_change_each_other_and_an_image_may_come_twice():
    model = elastic()
    prompts = [asked(model, HALF), asked(model, DENSE, 2, seed=3), asked(model, HALF, seed=5)]
    twice = pixels(7)[0]
    pictures = [picture_of(twice, PATCHES)] * 2
    prompts.append(model.prompt(HALF, ids_of(2), pictures))
    alone = [run(model, prompt) for prompt in prompts]
    together = [model.imaged_sequence(prompt, 1) for prompt in prompts]
    text = model.sequence(DENSE, 4, 6)
    logits = model.step(
        [Chunk(text, [1, 2, 3, 4])]
        + [Chunk(each, list(prompt.ids)) for each, prompt in zip(together, prompts, strict=True)]
    )
    for (sequence, expected), actual, joint in zip(alone, logits[1:], together, strict=True):
        torch.testing.assert_close(actual, expected[:1], **CLOSE)
        assert joint.usage.skipped == sequence.usage.skipped
        assert joint.usage.flops < sequence.usage.flops


def test_measuring_costs_leaves_nothing_behind():
    model = elastic()
    _, expected = run(model, asked(model, HALF))
    assert "sight" in vars(model)
    model = elastic()
    model.measure_costs(0.01)
    assert "sight" in vars(model)  # so that no caller waits for it
    _, actual = run(model, asked(model, HALF))
    torch.testing.assert_close(actual, expected, **CLOSE)


# Stored beginnings.


@pytest.mark.parametrize("capacity", [DENSE, HALF])
def test_a_stored_beginning_is_found_by_the_image_and_its_share(capacity):
    model = elastic()
    model.open_cache(4096)
    prompt = asked(model, capacity, images=3)
    first, expected = run(model, prompt, cuts=(32,))
    again, actual = run(model, prompt)
    other = model.imaged_sequence(asked(model, capacity, images=3, seed=1), 1)
    share = Capacity.parse({"image_tokens": 0.6}) if capacity is HALF else HALF
    elsewhere = model.imaged_sequence(asked(model, share, images=3), 1)

    assert first.cached_tokens == 0 and again.cached_tokens >= 32
    assert other.cached_tokens == elsewhere.cached_tokens == 0
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert again.usage.flops < first.usage.flops


# Numbers.


def test_neurons_are_divided_by_what_they_do_with_image_tokens():
    model, batch = elastic(), batch_of()
    orders = [
        model.blank_adapter([Unit.EXPERTS], experts=4, calibration_ids=given).neuron_order
        for given in (batch, batch, batch.ids_BT)
    ]
    same, other = (all(map(torch.equal, orders[0] or [], order or [])) for order in orders[1:])
    assert orders[0] and same and not other


# Bad input, and adapters.


def test_what_cannot_be_is_refused():
    model = elastic()
    with pytest.raises(InputError, match=f"the context holds {CONTEXT}"):
        model.imaged_sequence(asked(model, HALF), CONTEXT - 32)
    bare = ElasticVlm(tiny_vlm(), images=tiny_vlm_processor())
    with pytest.raises(CapacityError, match="no router for image_tokens; it has none"):
        bare.prompt(HALF, ids_of(), [picture_of(pixels(0)[0], PATCHES)])
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM has no entry in .*vlms.py"):
        describe_vlm(tiny())
    with pytest.raises(AdapterError, match="image_tokens: this model reads none"):
        ElasticModel(tiny()).blank_adapter((Unit.IMAGE_TOKENS,))
    with pytest.raises(AdapterError, match="image scorer: one of linear, mlp; got 'deep'"):
        bare.blank_adapter((Unit.IMAGE_TOKENS,), image_scorer="deep")
    with pytest.raises(AdapterError, match="made for image-text-to-text"):
        ElasticModel(tiny()).attach(model.adapter)


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_a_saved_and_reloaded_adapter_gives_the_same_logits(tmp_path, scorer):
    save_tiny_vlm(tmp_path / "base", tiny_vlm())
    model = ElasticVlm.load(str(tmp_path / "base"), dtype="float32")
    adapter = model.blank_adapter((Unit.IMAGE_TOKENS,), image_scorer=scorer, lora_rank=0)
    adapter.calibration = Calibration(
        0.5, 64, dict.fromkeys(Phase, ()), {phase: {} for phase in Phase}, (), image_tokens=0.25
    )
    model.attach(adapter)
    _, expected = run(model, asked(model, HALF))
    adapter.save(tmp_path / "adapter")
    again = ElasticVlm.load(str(tmp_path / "base"), tmp_path / "adapter", dtype="float32")
    _, actual = run(again, asked(again, HALF))

    assert torch.equal(actual, expected)
    assert again.adapter.spec == adapter.spec and again.calibration.image_tokens == 0.25
    assert again.adapter.identity == adapter.identity
    saved = SavedAdapter.load(tmp_path / "adapter")
    wider = ElasticVlm(tiny_vlm(hidden_size=32), identity=saved.base)
    with pytest.raises(AdapterError, match=r"image\.outer\.weight: saved \(1, 24\)"):
        saved.fit(wider.layout, saved.base)


def test_the_router_learns_through_the_gate():
    model, batch = elastic(), batch_of()
    plans = [(dense_plan(LAYERS), dense_plan(LAYERS))]
    router = model.adapter.routers.image
    for parameter in router.parameters():
        parameter.requires_grad_(True)
    found = model.masked_images(batch, plans, shares=0.4)
    found.logits_BSV.square().mean().backward()
    assert router.outer.weight.grad.abs().max() > 0
    assert all(each.grad is None for each in model.vlm.whole.parameters())


def test_rows_of_different_length_are_aligned_by_where_they_stood():
    """Padded rows with different numbers of image tokens say what each says alone."""
    model = elastic()
    one, two = batch_of(1), batch_of(2, seed=4)
    longest = two.ids_BT.shape[1]

    def padded(x_BT):
        return torch.nn.functional.pad(x_BT, (0, longest - x_BT.shape[1]))

    batch = ImagedBatch(
        torch.cat([padded(one.ids_BT), two.ids_BT]),
        torch.cat([one.pixels_NCHW, two.pixels_NCHW]),
        torch.cat([padded(one.mask_BT), two.mask_BT]),
        torch.cat([padded(one.output_BT), two.output_BT]),
    )
    plans = [(dense_plan(LAYERS), dense_plan(LAYERS))]
    with torch.inference_mode():
        both = model.masked_images(batch, plans * 2, shares=0.4)
        alone = [model.masked_images(each, plans, shares=0.4) for each in (one, two)]
    for row, expected in enumerate(alone):
        mask_S = both.mask_BS[row]
        torch.testing.assert_close(both.logits_BSV[row][mask_S], expected.logits_BSV[0], **CLOSE)
        assert both.original_BS[row][mask_S].tolist() == expected.original_BS[0].tolist()


def test_a_plan_of_layers_knows_no_image_tokens():
    shares = UnitShares(image_tokens=0.5)
    assert shares.layer_plan() == LayerPlan() and not shares.is_dense
