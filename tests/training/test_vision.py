"""The vision transformer: how it begins, what is written, and a whole build in seconds."""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from elastiformer.capacity import WHOLE_LAYER, LayerPlan, dense_plan
from elastiformer.encoder import ElasticEncoder
from tests.training.fashion import sample
from training import vision
from training.convolutions import Convolutions
from training.fashion_mnist import normalized
from training.fitting import Stopped
from training.neighbours import GRID, OFFSETS
from training.vision import Scales, Size, Student, Views, accuracy, in_colour, lessons, stay_in

TINY = Size(width=32, layers=4, heads=2, inner=40)


def student(size: Size = TINY) -> Student:
    torch.manual_seed(0)
    return Student(size, Convolutions(2, 10))


def test_at_first_each_head_looks_at_one_neighbour():
    begun = student(Size(width=128, layers=1, heads=4, inner=32)).vit
    x_BHW = normalized(sample().pixels_NHW[:8].float() / 255)
    inner = begun.vit
    with torch.inference_mode():
        x_BTD = inner.layers[0].layernorm_before(inner.embeddings(x_BHW[:, None]))
        attention = inner.layers[0].attention
        query, key = (
            part(x_BTD).view(8, GRID * GRID + 1, 4, 32).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj)
        )
        shares = (query @ key.transpose(2, 3) * attention.scaling).softmax(3)[:, :, 1:, 1:].mean(0)
    for head, (down, right) in enumerate(OFFSETS[:4]):
        for row in range(1, GRID - 1):
            for column in range(1, GRID - 1):
                most = int(shares[head, row * GRID + column].argmax())
                assert divmod(most, GRID) == (row + down, column + right)


def test_training_sees_what_the_served_model_computes():
    trained = student()
    x_BHW = normalized(sample().pixels_NHW[:3].float() / 255)
    with torch.inference_mode():
        whole = trained(x_BHW, TINY.layers - 1)
        expected = trained.vit(x_BHW[:, None]).logits
        left = trained(x_BHW, 2)
    torch.testing.assert_close(whole.logits_BK, expected, atol=1e-5, rtol=1e-5)
    assert whole.places_BPC.shape == (3, 49, 8) and whole.parts_BPC.shape == (3, 49, 16)
    assert not torch.allclose(left.logits_BK, expected)
    assert not torch.allclose(left.places_BPC, whole.places_BPC)


def test_patches_that_leave_early_are_a_plan_that_keeps_no_later_layer():
    trained = student()
    images = in_colour(trained.vit)
    x_BHW = normalized(sample().pixels_NHW[:3].float() / 255)
    model = ElasticEncoder(images)
    gone = LayerPlan(attention_tokens=0.0, mlp_tokens=0.0)
    plan = (WHOLE_LAYER,) * 2 + (gone,) * 2
    items = [model.image(each.expand(3, -1, -1)) for each in x_BHW]
    with torch.inference_mode():
        expected = trained(x_BHW, 2).logits_BK
        plans = [(plan, dense_plan(4))] * 3
        actual = model.masked(model.collate(items), plans).outputs
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_most_steps_let_the_patches_leave_and_the_others_are_whole():
    options = {"leaving_share": 0.7, "earliest": 2, "seed": 3}
    stays = [stay_in(step, 8, options) for step in range(400)]
    assert set(stays) == {2, 3, 4, 5, 6, 7}
    assert 0.25 < stays.count(7) / 400 < 0.35
    assert {stay_in(step, 3, options) for step in range(9)} == {2}  # nothing to leave


def test_in_colour_a_grey_image_says_the_same():
    grey = student().vit.eval()
    x_BHW = normalized(sample().pixels_NHW[:3].float() / 255)
    with torch.inference_mode():
        expected = grey(x_BHW[:, None]).logits
        actual = in_colour(grey)(x_BHW[:, None].expand(-1, 3, -1, -1)).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_there_is_nothing_to_learn_from_a_teacher_that_is_matched():
    teacher = Convolutions(2, 10).eval()
    x_BHW = normalized(sample().pixels_NHW[:4].float() / 255)
    with torch.no_grad():
        seen = teacher(x_BHW)
    parts, places = (
        each.flatten(2).transpose(1, 2) for each in (seen.parts_BCHW, seen.places_BCHW)
    )
    labels = seen.logits_BK.argmax(1)
    plain = Scales(*(torch.stack([torch.zeros(n), torch.ones(n)]) for n in (16, 8)))

    matched = lessons(seen, plain, Views(parts, places, seen.logits_BK), labels)
    assert float(matched["answers"]) == pytest.approx(0, abs=1e-6)
    assert float(matched["parts"]) == float(matched["places"]) == 0
    other = Views(parts.roll(1, 1), places.roll(1, 1), -seen.logits_BK)
    told = lessons(seen, plain, other, labels)
    assert all(float(told[name]) > 0 for name in ("answers", "parts", "places"))


@pytest.fixture
def small(monkeypatch):
    """The build on 64 images: nothing of it is left out but size."""
    monkeypatch.setattr(vision, "fetch_images", lambda _: {"train": sample(), "test": sample()})
    monkeypatch.setattr(vision, "Size", lambda: TINY)
    changes = {
        "batch": 32,
        "epochs": 30,
        "teacher_batch": 32,
        "teacher_epochs": 20,
        "teacher_width": 4,
        "lr": 0.01,
    }
    return {**vision.OPTIONS, **changes, "seed": 0}


def test_a_build_from_start_to_folder_learns_its_images(small, tmp_path):
    report = vision.build(tmp_path / "model", tmp_path / "run", tmp_path, small)

    assert report["teacher_test_accuracy"] > 0.3  # of ten classes, augmented, in two seconds
    assert report["test_accuracy"] > 0.3
    folder = tmp_path / "model"
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = sample().pixels_NHW[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        logits = model.eval()(**images(list(pixels.numpy()), return_tensors="pt")).logits
    found = float((logits.argmax(1) == sample().labels_N).float().mean())
    assert found == pytest.approx(report["test_accuracy"], abs=0.02)
    assert model.config.id2label[9] == "Ankle boot"
    assert "MIT licence" in (folder / "README.md").read_text()


def test_a_build_that_is_told_to_stop_says_where_it_stands(small, tmp_path, monkeypatch):
    class Told:
        asked = True

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("training.fitting.Stop", Told)
    with pytest.raises(Stopped):
        vision.build(tmp_path / "model", tmp_path / "run", tmp_path, small)
    assert not (tmp_path / "model").exists()


def test_accuracy_is_the_share_of_right_answers():
    images = sample()
    answers = torch.nn.functional.one_hot(images.labels_N, 10).float()
    at = iter(range(0, 64, 16))

    def three_of_four_right(_):
        logits = answers[(start := next(at)) : start + 16].clone()
        logits[:4] = logits[:4].roll(1, 1)
        return logits

    assert accuracy(three_of_four_right, images, batch=16) == 0.75
