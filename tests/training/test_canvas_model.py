"""The vision-language model on canvases: how it begins, and a whole build in seconds."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from tests.tiny import VOCAB, tiny, tiny_tokenizer
from tests.training.fashion import sample
from training import canvas_answers, canvas_model, vision
from training.canvas_answers import IGNORED, IMAGE
from training.canvas_model import UNUSED
from training.canvas_tower import PATCHES, Canvases, begun_tower, pixels
from training.canvases import KINDS, SIDE, Question
from training.convolutions import Convolutions
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
    student = Student(Size(width=32, layers=2, heads=2, inner=40), Convolutions(2, 10))
    write_vision(student.vit, tmp_path / "tower")
    return tmp_path / "tower"


def test_the_tower_begins_with_the_classifier_s_layers_on_a_larger_grid(tower):
    begun = begun_tower(tower)
    small = vision.ViTForImageClassification.from_pretrained(tower, dtype=torch.float32)
    for name, weight in begun.vit.state_dict().items():
        if "position" not in name:
            assert torch.equal(weight, small.vit.state_dict()[name])
    assert begun.vit.embeddings.position_embeddings.shape == (1, PATCHES + 1, 32)
    seen = begun(torch.zeros(2, 3, SIDE, SIDE))
    assert seen.kinds_BPK.shape == (2, PATCHES, len(KINDS) + 1)
    assert seen.corners_BPQ.shape == (2, PATCHES, 5) and seen.middles_BP2.shape[2] == 2


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
        "tower": tower,
        "tower_canvases": 8,
        "tower_batch": 4,
        "projector_steps": 2,
        "canvases": 8,
        "set_steps": 2,
        "batch": 4,
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
    assert processor.tokenizer.decode(given["input_ids"][0]) == canvas_answers.prompt_of(question)
    torch.testing.assert_close(given["pixel_values"], pixels([canvas]), atol=0.02, rtol=0)
    with torch.inference_mode():
        made = model.generate(**given, max_new_tokens=2, do_sample=False)
    assert made.shape[1] >= given["input_ids"].shape[1] + 1


@pytest.fixture
def model(tower):
    base = language()
    tokenizer = canvas_model.with_image_token(base.tokenizer)
    return canvas_model.joined(begun_tower(tower).vit, base.model, tokenizer), tokenizer


def features_of(model, canvas):
    given = model.get_image_features(
        pixels([canvas]), vision_feature_layer=-1, vision_feature_select_strategy="default"
    )
    return torch.stack(list(given.pooler_output))


def test_a_question_in_a_row_of_several_is_answered_as_alone(model):
    model, tokenizer = model
    test = Canvases(sample(), 0, "test", 1, questions=6)
    canvas = test.canvas(0)
    asked = test.asked(0, canvas)
    assert len(asked) == 6 and len(set(asked)) == len(asked)
    all_BP = torch.arange(PATCHES)[None]
    with torch.inference_mode():
        features_BPD = features_of(model, canvas)

        def logits(questions):
            rows = canvas_answers.rows_of(tokenizer, [questions], all_BP, "cpu")
            return canvas_answers.answer_logits(model, rows, features_BPD)[0]

        together, alone = logits(asked), [logits([question]) for question in asked]
        torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=2e-4)
        # And alone it is what Transformers' own forward gives.
        prompt = canvas_answers.prompt_of(asked[0])
        ids = tokenizer.encode(f"{prompt}{asked[0].answer}<|im_end|>", return_tensors="pt")
        plain = model(input_ids=ids, pixel_values=pixels([canvas])).logits[0]
        answer = len(tokenizer.encode(asked[0].answer)) + 1
        torch.testing.assert_close(plain[-answer - 1 : -1], alone[0], atol=2e-4, rtol=2e-4)


def test_few_image_tokens_stand_where_they_stood_among_all(model):
    _, tokenizer = model
    kept_BP = torch.tensor([[2, 5, 40]])
    rows = canvas_answers.rows_of(tokenizer, [[Question("what", "What?", "bag")]], kept_BP, "cpu")
    image = (rows.ids_BT[0] == tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[:, 0]
    first = int(image[0])
    assert rows.place_BT[0, image].tolist() == [first + 2, first + 5, first + 40]
    assert rows.place_BT[0, image[-1] + 1] == first + PATCHES


def test_a_right_answer_is_counted_just_where_greedy_decoding_gives_it(model):
    model, tokenizer = model
    canvas = Canvases(sample(), 0, "test", 1).canvas(0)
    question = Question("what", "What?", "")
    prompt = tokenizer.encode(canvas_answers.prompt_of(question), return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(
            input_ids=prompt, pixel_values=pixels([canvas]), max_new_tokens=3, do_sample=False
        )[0, prompt.shape[1] :].tolist()
    assert IGNORED not in made

    class Echo:
        """Wants these tokens as an answer, the last of them as its end."""

        def __init__(self, wanted):
            self.wanted = wanted

        def encode(self, text, **options):
            if text.startswith("answer"):
                return self.wanted if text.endswith("<|im_end|>") else self.wanted[:-1]
            return tokenizer.encode(text, **options)

    asked = [Question("what", "What?", "answer")]
    one = SimpleNamespace(count=1, canvas=lambda _: canvas, asked=lambda *_: asked)
    right = canvas_answers.answer_accuracy(model, Echo(made), one, "cpu")
    other = [*made[:-1], (made[-1] + 1) % VOCAB]
    wrong = canvas_answers.answer_accuracy(model, Echo(other), one, "cpu")
    assert right["all"] == 1.0 and wrong["all"] == 0.0
