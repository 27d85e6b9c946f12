"""What a command cannot do is said in a sentence, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_encoders import save_tiny_encoder, tiny_encoder
from tests.tiny_vlms import save_tiny_vlm, tiny_vlm
from tests.training.test_calibrate import calibrate, folders, prose  # noqa: F401
from training import calibrate as calibration
from training import distill, domains, evaluate, seeds
from training.__main__ import main
from training.files import RunError, check_writable, run_beside

# Options that every command insists on, as far as they stand before what is refused.
NEEDED = {
    "distill": "--base b --data d",
    "repair": "--base b --adapter a --data d",
    "ranks": "--base b --data d --held-out h --leave-at 1",
    "evaluate": "--base b --adapter a --data d",
    "ablate": "--base b --adapter a --data d --held-out h",
    "recipe": "--base b --data d --held-out h",
    "domains": "--base b --data d --test t --domain x=1 --domain y=2",
    "reconstruct": "--base b --adapter a --data d",
    "seeds": "--base b --adapter a --data d --held-out h --test t --work w",
    "build": "sentiment",
    "synthesize": "--base b --prompts p --tokens 1",
    "summarize": "--reports r",
}


@pytest.mark.parametrize("command", NEEDED)
def test_a_place_that_takes_no_results_is_refused_before_anything_is_read(
    tmp_path, capsys, command
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    beneath = tmp_path / "file" / "out"

    assert main([command, *NEEDED[command].split(), "--out", str(beneath)]) == 1
    assert f"--out {beneath}: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    other = tmp_path / ("folder" if command in ("synthesize", "summarize") else "file")
    assert main([command, *NEEDED[command].split(), "--out", str(other)]) == 1
    assert f"--out {other}: is a {other.name}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_so_is_the_folder_that_seeds_work_in(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    command = ["seeds", *NEEDED["seeds"].split(), "--out", str(tmp_path / "out")]

    assert main([*command, "--work", str(tmp_path / "file")]) == 1
    assert f"--work {tmp_path / 'file'}: is a file" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    check_writable("--out", tmp_path / "new" / "newer")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunError, match=f"{tmp_path} cannot be written to"):
        check_writable("--out", tmp_path / "new" / "newer")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_run_lies_beside_what_has_a_name(name):
    assert run_beside(Path("a/b")) == Path("a/b.run")
    with pytest.raises(RunError, match="a folder's name is expected"):
        run_beside(Path(name))


def test_what_the_machine_refuses_is_said_without_a_traceback(tmp_path, capsys, monkeypatch):
    def full(args):
        raise OSError(28, "No space left on device", "there")

    monkeypatch.setattr("training.summarize.run", full)
    assert main(["summarize", "--reports", "r", "--out", str(tmp_path / "s.md")]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'there'\n"


@pytest.mark.parametrize(
    ("command", "option", "value", "bound"),
    [
        ("calibrate", "--windows", "-2", "at least 1; got -2"),
        ("calibrate", "--check-windows", "0", "at least 1; got 0"),
        ("calibrate", "--window", "2", "at least 3; got 2"),
        ("calibrate", "--prompt-tokens", "0", "at least 2; got 0"),
        ("calibrate", "--sweeps", "-1", "at least 0; got -1"),
        ("calibrate", "--max-minutes", "nan", "above 0; got nan"),
        ("calibrate", "--seed", "-1", "at least 0; got -1"),  # the table could not be read again
        ("calibrate", "--items", "0", "at least 1; got 0"),
        ("calibrate", "--check-items", "-1", "at least 1; got -1"),
        ("evaluate", "--windows", "-3", "at least 1; got -3"),
        ("evaluate", "--items", "-4", "at least 1; got -4"),
        ("evaluate", "--repeats", "-1", "at least 0; got -1"),
        ("evaluate", "--greedy-tokens", "-5", "at least 0; got -5"),
        ("evaluate", "--time-prompt-tokens", "0", "at least 1; got 0"),
        ("evaluate", "--decode-tokens", "0", "at least 1; got 0"),
        ("evaluate", "--seed", "-1", "at least 0; got -1"),
        ("synthesize", "--top-p", "2", "above 0 and at most 1; got 2"),
    ],
)
def test_a_number_outside_its_bounds_is_refused_with_both(
    capsys, tmp_path, command, option, value, bound
):
    needed = NEEDED.get(command, NEEDED["evaluate"]).split()
    out = [] if command == "calibrate" else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([command, *needed, *out, option, value])
    assert f"{option}: {bound}" in capsys.readouterr().err


def never(*args, **kwargs):
    raise AssertionError("work began before what is wrong was said")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--window 600", "--window 600: the context of this model is 512"),
        ("--greedy-tokens 500", "--greedy-tokens 500: at most 406 after a prompt of 106"),
        ("--decode-tokens 400", "--decode-tokens 400: below 320"),
        ("--repair-data none.jsonl", "none.jsonl: no such file"),
        ("--repair-data {data} --repair-window 600", "--repair-window 600: the context"),
        ("--adapter owner/name --update-adapter", "writes into a folder; owner/name is none"),
    ],
)
def test_an_evaluation_that_would_end_in_an_error_does_not_begin(
    folders,  # noqa: F811
    capsys,
    monkeypatch,
    options,
    told,
):
    base, adapter, data = folders
    assert main([*calibrate(folders)[:-2], "--uniform"]) == 0
    monkeypatch.setattr(evaluate, "measure", never)
    command = ["evaluate", "--base", str(base), "--adapter", str(adapter), "--data", str(data)]
    command += ["--out", str(base.parent / "report"), "--windows", "2", "--window", "160"]

    assert main([*command, "--baselines", "none", *options.format(data=data).split()]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "repair", "ranks"])
def test_windows_beyond_the_context_are_refused(folders, capsys, monkeypatch, command):  # noqa: F811
    base, adapter, data = folders
    monkeypatch.setattr(calibration, "PathSearch", never)
    given = {
        "calibrate": ["--adapter", str(adapter)],
        "repair": ["--adapter", str(adapter), "--out", str(base.parent / "out")],
        "ranks": ["--held-out", str(data), "--leave-at", "1", "--out", str(base.parent / "out")],
    }[command]
    command_line = [command, "--base", str(base), "--data", str(data), *given]

    assert main([*command_line, "--windows", "1", "--window", "600"]) == 1
    assert "--window 600: the context of this model is 512 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--experts 16", "experts: 16 do not divide 56 neurons"),
        ("--held-out none.jsonl", "none.jsonl: no such file"),
    ],
)
def test_a_study_of_the_recipe_trains_nothing_that_it_cannot_measure(
    tmp_path, tiny_folder, capsys, monkeypatch, options, told
):
    monkeypatch.setattr(distill, "prepared", never)
    (tmp_path / "train.jsonl").write_text(prose())
    command = ["recipe", "--base", str(tiny_folder), "--data", str(tmp_path / "train.jsonl")]
    command += ["--held-out", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "report")]
    command += ["--batch-tokens", "64", "--window", "32", "--held-out-window", "48"]

    assert main([*command, "--experts", "7", *options.split()]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--experts 16", "experts: 16 do not divide 56 neurons"),
        ("--held-out none.jsonl", "none.jsonl: no such file"),
        ("--test none.jsonl", "none.jsonl: no such file"),
        ("--windows 900", "900 are wanted"),
        ("--repair-windows 900", "901 are wanted"),
        ("--capacities 1.0", "--capacities: at least one below 1"),
    ],
)
def test_seeds_make_nothing_that_a_later_step_refuses(
    folders,  # noqa: F811
    capsys,
    monkeypatch,
    options,
    told,
):
    base, adapter, data = folders
    monkeypatch.setattr(seeds, "call", never)
    command = ["seeds", "--base", str(base), "--adapter", str(adapter), "--experts", "7"]
    command += ["--data", str(data), "--held-out", str(data), "--test", str(data)]
    command += ["--windows", "2", "--window", "96", "--calibrate-windows", "1"]
    command += ["--check-windows", "1", "--repair-windows", "3", "--repair-window", "64"]
    command += ["--work", str(base.parent / "work"), "--out", str(base.parent / "out")]

    assert main([*command, *options.split()]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--capacities 1.0", "--capacities: at least one below 1"),
        ("--windows 900", "900 are wanted"),
    ],
)
def test_domains_train_nothing_that_they_cannot_measure(
    tmp_path, tiny_folder, capsys, monkeypatch, options, told
):
    monkeypatch.setattr(domains.distill, "run", never)
    lines = [
        json.dumps(json.loads(line) | {"label": seed})
        for seed in (0, 1)
        for line in prose(seed).splitlines()
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    command = ["domains", "--base", str(tiny_folder), "--data", str(tmp_path / "texts.jsonl")]
    command += ["--test", str(tmp_path / "texts.jsonl"), "--domain", "a=0", "--domain", "b=1"]

    assert main([*command, "--out", str(tmp_path / "out"), *options.split()]) == 1
    assert told in capsys.readouterr().err


def test_an_encoder_of_images_refuses_text(tmp_path, capsys):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("vit"))
    (tmp_path / "texts.txt").write_text("A text.\n")
    command = ["distill", "--base", str(base), "--data", str(tmp_path / "texts.txt")]

    assert main([*command, "--out", str(tmp_path / "out"), "--units", "mlp_tokens"]) == 1
    assert f"{tmp_path / 'texts.txt'}: text, and this model reads images" in capsys.readouterr().err


def test_exchanges_that_are_no_text_are_refused_at_their_byte(tmp_path, capsys):
    base = save_tiny_vlm(tmp_path / "base", tiny_vlm())
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff"}')
    command = ["distill", "--base", str(base), "--data", str(tmp_path / "data.jsonl")]

    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "data.jsonl: not UTF-8 at byte 10" in capsys.readouterr().err
