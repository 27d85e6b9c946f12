"""The log of a run: whole lines, no step twice, and a picture."""

import json

from training.progress import Log


def steps(folder):
    return [
        json.loads(line)["step"] for line in (folder / "progress.jsonl").read_text().splitlines()
    ]


def test_a_resumed_log_holds_every_step_once(tmp_path):
    first = Log(tmp_path, "distill", steps=6, done=0)
    for step in range(1, 5):
        first.step(step, {"distil": 1 / step})
    first.close()
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"step": 5, "dis')  # killed in the middle of a line

    second = Log(tmp_path, "distill", steps=6, done=2)
    for step in range(3, 7):
        second.step(step, {"distil": 1 / step})
    second.close()
    second.draw(tmp_path / "curve.png", ["distil", "held_out"])

    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_that_does_not_lead_leaves_nothing(tmp_path):
    log = Log(tmp_path / "run", "distill", steps=2, done=0, show=False)
    log.step(1, {"distil": 1.0})
    log.close()

    assert not (tmp_path / "run").exists()
