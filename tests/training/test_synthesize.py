"""Synthesis: the teacher's own words, seeded, resumable, in the form that training reads."""

import json

import pytest
import torch

from elastiformer import ElasticModel
from training.__main__ import main
from training.data import read_corpus
from training.synthesize import Prompt, Style, answers, prompt_ids


@pytest.fixture
def synthesize(tiny_folder, tmp_path, capsys):
    def run(prompts, out, *options, tokens=60):
        command = ["synthesize", "--base", str(tiny_folder), "--prompts", str(prompts)]
        command += ["--out", str(tmp_path / out), "--tokens", str(tokens), "--max-new", "9"]
        code = main([*command, "--batch", "2", *options])
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err

    return run


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("What is a router?\n\nWho pays?\nWhy?\n")
    return path


def test_a_chat_model_answers_each_prompt_in_turn(synthesize, prompts, tmp_path, tiny_tokenizer):
    report = synthesize(prompts, "a.jsonl")

    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert report["lines"] == len(lines) > 3
    assert report["tokens"] >= 60
    asked = [line["messages"][0]["content"] for line in lines]
    assert asked[:4] == ["What is a router?", "Who pays?", "Why?", "What is a router?"]
    assert all(line["messages"][1]["role"] == "assistant" for line in lines)
    assert lines[0]["messages"][1] != lines[3]["messages"][1]  # a second visit, another answer
    assert len(read_corpus(str(tmp_path / "a.jsonl"), tiny_tokenizer).documents) == len(lines)


def test_the_same_seed_writes_the_same_file_and_another_another(synthesize, prompts, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        synthesize(prompts, f"{name}.jsonl", "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")

    assert a == b
    assert a != c


def test_a_killed_run_goes_on_after_its_last_whole_line(synthesize, prompts, tmp_path):
    synthesize(prompts, "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    two_lines = whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 1]
    (tmp_path / "killed.jsonl.part").write_bytes(two_lines + b'{"messages": [{"ro')

    synthesize(prompts, "killed.jsonl")

    assert (tmp_path / "killed.jsonl").read_bytes() == whole
    assert not (tmp_path / "killed.jsonl.part").exists()


def test_nothing_is_written_over_or_mixed(synthesize, prompts, tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    assert "exists already" in synthesize(prompts, "there.jsonl")

    other = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "b.jsonl.part").write_text(json.dumps(other) + "\n")
    assert "line 1: written for another prompt" in synthesize(prompts, "b.jsonl")


def test_a_prompt_without_room_for_an_answer_is_refused_before_any_is_written(synthesize, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("Why?\n" + "Why so? " * 90)

    assert "prompt 2 of 2: " in (told := synthesize(path, "a.jsonl"))
    assert "leave no room in a context of 512" in told
    assert not (tmp_path / "a.jsonl.part").exists()


def test_a_conversation_is_continued_where_its_last_answer_was(synthesize, tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "The old answer."},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "So?"}) + "\n")

    synthesize(path, "a.jsonl")

    first, second = (tmp_path / "a.jsonl").read_text().splitlines()[:2]
    assert json.loads(first)["messages"][:2] == turns[:2]
    assert json.loads(first)["messages"][2]["content"] != "The old answer."
    assert json.loads(second)["messages"][0] == {"role": "user", "content": "So?"}


def test_a_model_without_a_chat_template_continues_the_text(
    synthesize, prompts, tiny_folder, tmp_path
):
    (tiny_folder / "chat_template.jinja").unlink()

    synthesize(prompts, "a.jsonl")

    lines = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[1].startswith("Who pays?")
    assert len(lines[1]) > len("Who pays?")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.md", "Why?", ".txt or .jsonl"),
        ("p.jsonl", '{"prompt": "Why?"}\n{"prompt": 3}', "line 2"),
        ("p.jsonl", "{", "line 1: not JSON"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "Hm."}]}', "nobody asks"),
        ("p.txt", "Why? " * 200, "no room in a context of 512"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(synthesize, tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)

    assert fault in synthesize(tmp_path / name, "a.jsonl")


def test_greedy_answers_are_those_of_transformers(tiny_folder):
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    asked = [Prompt(text="What is"), Prompt(text="A longer prompt than the other one")]

    written = answers(model, asked, Style(0.0, 1.0, 0, most_new=12), first=0)

    for prompt, answer in zip(asked, written, strict=True):
        ids = torch.tensor([prompt_ids(model, prompt)])
        out = model.base.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        expected = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == expected
