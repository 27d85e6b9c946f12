"""Images of other sizes than a base was made for: positions interpolated as in Transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessorPil

from elastiformer import DENSE
from elastiformer.encoder import ElasticEncoder
from elastiformer.errors import BaseModelError, InputError
from tests.elastiformer.test_encoders import (
    CLOSE,
    PLANS,
    elastic_encoder,
    masked_outputs,
    planned,
    pooled,
    stepped,
)
from tests.tiny_encoders import IMAGE_FAMILIES, own_task, tiny_encoder, tiny_image_processor


@pytest.mark.parametrize(("height", "width"), [(12, 12), (32, 32), (16, 28), (36, 20)])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_positions_are_interpolated_as_transformers_does_it(family, height, width):
    """For images smaller, larger and of another shape than the base was made for."""
    for task in {own_task(family), "features"}:
        model = elastic_encoder(family, task)
        model = ElasticEncoder(
            tiny_encoder(family, task),
            model.adapter,
            images=tiny_image_processor(family, height, width),
        )
        numbers = np.random.default_rng(4).integers(0, 255, (50, 60, 3), dtype=np.uint8)
        item = model.inputs.item(numbers)
        assert item.pixels_CHW.shape[1:] == (height, width)
        assert len(item.ids) == model.context
        batch = model.collate([item])
        told = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
        if family == "vit-mae":
            told["noise"] = batch.inputs["noise"]
        base = tiny_encoder(family, task)
        base.config.mask_ratio = 0.0
        fields = {"siglip": "pooler_output", "clip": "pooler_output"}
        field = fields.get(family, "last_hidden_state") if task == "features" else "logits"
        with torch.inference_mode():
            said = base(item.pixels_CHW[None], **told)
            expected = said["image_embeds" if family == "clip-projected" else field]
            assert torch.equal(model.teacher(batch), expected)
            (packed,) = model.encode([item], [DENSE])
        rows = expected[0] if task != "features" else pooled(model, expected[0])
        torch.testing.assert_close(packed, rows, **CLOSE)
        routed = planned(model, item, PLANS)
        with FlopCounterMode(display=False) as counter:
            (sparse,) = stepped(model, routed)
        torch.testing.assert_close(sparse, masked_outputs(model, [item], PLANS)[0], **CLOSE)
        assert routed.usage.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_images_whose_shape_is_kept_run_side_by_side_up_to_four_times_as_long():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    model = ElasticEncoder(tiny_encoder("dinov2"), images=processor)
    shapes = [(40, 40), (40, 80), (160, 40), (30, 40)]
    given = [model.inputs.item(np.full((*sides, 3), 90, np.uint8)) for sides in shapes]
    assert [len(item.ids) for item in given] == [1 + 16, 1 + 32, 1 + 64, 1 + 20]
    assert model.context == 65
    together = model.encode(given, [DENSE] * len(given))
    for item, output in zip(given, together, strict=True):
        with torch.inference_mode():
            expected = model.base(item.pixels_CHW[None]).logits[0]
        torch.testing.assert_close(output, expected, **CLOSE)
    longer = model.inputs.item(np.zeros((200, 40, 3), np.uint8))
    with pytest.raises(InputError, match="81 tokens; this model takes 1 to 65"):
        model.sequence(DENSE, longer)


def test_a_processor_whose_images_have_no_patch_is_refused_with_both_sizes():
    model = ElasticEncoder(tiny_encoder("vit"), images=tiny_image_processor("vit", 3, 12))
    with pytest.raises(BaseModelError, match="images of 3 x 12 pixels, smaller than one patch of"):
        model.measure_costs(0.01)
