"""The vision-language model on canvases: how it begins, and a whole build in seconds."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from tests.tiny import VOCAB, tiny, tiny_tokenizer
from tests.training.fashion import sample
from training import canvas_model, vision
from training.canvas_model import IMAGE, UNUSED
from training.canvas_tower import PATCHES, Canvases, begun_tower, pixels
from training.canvases import SIDE
from training.files import RunError
from training.vision import Size, Student, write_vision


def language():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [UNUSED]})
    assert len(tokenizer) == VOCAB + 1
    return SimpleNamespace(tokenizer=tokenizer, model=tiny("llama", vocab_size=VOCAB + 1))


@pytest.fixture
def tower(tmp_path):
    torch.manual_seed(0)
    student = Student(Size(width=32, layers=2, heads=2, inner=40), teacher_width=8)
    write_vision(student.vit, tmp_path / "tower")
    return tmp_path / "tower"


def test_the_tower_begins_with_the_classifier_s_layers_on_a_larger_grid(tower):
    begun = begun_tower(tower)
    small = vision.ViTForImageClassification.from_pretrained(tower, dtype=torch.float32)
    for name, weight in begun.vit.state_dict().items():
        if "position" not in name:
            assert torch.equal(weight, small.vit.state_dict()[name])
    assert begun.vit.embeddings.position_embeddings.shape == (1, PATCHES + 1, 32)
    assert begun(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, PATCHES, 11)


def test_the_image_token_takes_the_place_of_one_that_no_chat_holds(tmp_path):
    before = language().tokenizer
    tokenizer = canvas_model.with_image_token(language().tokenizer)
    assert tokenizer.encode(IMAGE) == before.encode(UNUSED) == [VOCAB]
    assert tokenizer.encode("hi 42") == before.encode("hi 42")
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert said == f"<|im_start|>user\n{IMAGE}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(IMAGE) == [VOCAB]

    with pytest.raises(RunError, match="has no token <gh_stars>"):
        canvas_model.with_image_token(tiny_tokenizer())


def test_a_build_from_start_to_folder(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(
        canvas_model, "fetch_images", lambda _: {"train": sample(), "test": sample()}
    )
    monkeypatch.setattr(canvas_model, "load_base", lambda *_, **__: language())
    options = {
        **canvas_model.OPTIONS,
        "canvases": 4,
        "tower": tower,
        "batch": 4,
        "tower_epochs": 2,
        "epochs": 1,
        "rank": 2,
        "seed": 0,
    }
    report = canvas_model.build(tmp_path / "out", tmp_path / "run", tmp_path, options)

    assert 0 <= report["answer_accuracy"]["all"] <= 1
    folder = tmp_path / "out"
    assert (folder / "changes" / "changes.safetensors").stat().st_size < 300_000
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    test = Canvases(sample(), 0, "test", 8)
    canvas = test.canvas(0)
    question = test.asked(0, canvas)[0]
    image = (canvas.grey_HW * 255).round().to(torch.uint8).expand(3, -1, -1).numpy()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = processor(images=image, text=prompt, return_tensors="pt")

    # What Transformers makes of the question and the image is what training made of them.
    assert processor.tokenizer.decode(given["input_ids"][0]) == canvas_model.prompt_of(question)
    torch.testing.assert_close(given["pixel_values"], pixels([canvas]), atol=0.02, rtol=0)
    with torch.inference_mode():
        made = model.generate(**given, max_new_tokens=2, do_sample=False)
    assert made.shape[1] >= given["input_ids"].shape[1] + 1


def test_a_right_answer_is_counted_just_where_greedy_decoding_gives_it(tower):
    base = language()
    tokenizer = canvas_model.with_image_token(base.tokenizer)
    model = canvas_model.joined(begun_tower(tower).vit, base.model, tokenizer)
    test = Canvases(sample(), 0, "test", 1)
    canvas = test.canvas(0)
    asked = test.asked(0, canvas)
    inputs, labels_BT = canvas_model.batch_of(tokenizer, asked[:1], "cpu")
    length = int((labels_BT[0] == canvas_model.IGNORED).sum())
    with torch.inference_mode():
        made = model.generate(
            input_ids=inputs["input_ids"][:, :length],
            pixel_values=pixels([canvas]),
            max_new_tokens=labels_BT.shape[1] - length,
            do_sample=False,
        )[0, length:]

    class Echo:
        """Wants what greedy decoding gave, then something else."""

        def __init__(self, answer):
            self.answer = answer

        def encode(self, text, **options):
            if text.endswith("assistant\n"):
                return tokenizer.encode(text, **options)
            return self.answer

    one = SimpleNamespace(count=1, canvas=lambda _: canvas, asked=lambda *_: asked[:1])
    right = canvas_model.answer_accuracy(model, Echo(made.tolist()), one, "cpu")
    other = [*made.tolist()[:-1], (int(made[-1]) + 1) % VOCAB]
    wrong = canvas_model.answer_accuracy(model, Echo(other), one, "cpu")
    assert right["all"] == 1.0 and wrong["all"] == 0.0
