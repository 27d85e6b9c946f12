"""Promises of plans by the stretch: they are those of one position after the other."""

from types import SimpleNamespace

import pytest

from elastiformer import Capacity, Phase, UnitShares
from elastiformer.calibration import output_context
from elastiformer.capacity import dense_plan
from elastiformer.planning import Planner, divide, opened, prompt_context
from elastiformer.sequence import Numbering, Sequence
from elastiformer.stretches import Plans
from tests.elastiformer.test_calibration import LAYERS, SHAPE, calibration

PIECE = 48  # tokens of a scored text that are planned alike
PROMPT, MOST = 301, 700
EVEN = UnitShares(channels=0.5)
CAPACITIES = (Capacity(0.7, 0.55), Capacity(1.0, 0.6), Capacity(0.83, 1.0), Capacity(EVEN, 0.9))


def planner() -> Planner:
    adapter = SimpleNamespace(units=(), calibration=calibration())
    return Planner(SHAPE, adapter, piece_tokens=PIECE)


def expected_plan(capacity, phase, position, scored=False):
    """What the calibration says of one position."""
    share = capacity.of(phase)
    if isinstance(share, UnitShares):
        return (share.layer_plan(),) * LAYERS
    if share == 1.0:
        return dense_plan(LAYERS)
    context = prompt_context(PROMPT)
    if phase is Phase.PROMPT:
        division = divide(calibration(), SHAPE, share, 1 - capacity.output, context)
        if position >= PROMPT - 1 - division.ending:
            return dense_plan(LAYERS)
        share = division.others
    elif position == PROMPT - 1 and not scored:
        return dense_plan(LAYERS)
    elif position >= PROMPT:
        context = output_context(position)
    else:
        context = prompt_context(min((position // PIECE + 1) * PIECE, PROMPT))
    return calibration().schedule(share, phase, SHAPE, context).plan_at(position)


def one_by_one(sequence, tokens, numbering):
    return [
        numbering.of(sequence.run_at(position), sequence.phase_at(position))
        for position in range(sequence.length, sequence.length + tokens)
    ]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
def test_every_position_has_the_plan_that_its_schedule_gives(capacity, scored):
    plan_at = planner().plan_at(capacity, PROMPT, scored)
    sequence = Sequence(plan_at, PROMPT, MOST, scored, None)
    for position in [*range(MOST), *range(MOST - 1, -1, -7)]:
        expected = expected_plan(capacity, sequence.phase_at(position), position, scored)
        assert sequence.plan_at(position).plan == expected, position


@pytest.mark.parametrize("opening", [0, 5])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
def test_a_chunks_rows_are_numbered_as_one_by_one(capacity, scored, opening):
    made = planner()
    plan_at = made.plan_at(capacity, PROMPT)
    if opening:
        plan_at = opened(plan_at, made.pricing[Phase.OUTPUT].dense, PROMPT - 1 + opening)
    sequence = Sequence(plan_at, PROMPT, MOST, scored, None)
    for sizes in ((MOST,), (1, 2, 3, 290, 2, 3, 399), (1,) * MOST, (64,) * (MOST // 64)):
        sequence.length, found, expected = 0, Numbering(), Numbering()
        for size in sizes:
            actual = sequence.numbers(size, found)
            assert list(actual) == one_by_one(sequence, size, expected)
            sequence.length += size
        assert found.kinds == expected.kinds
        if capacity.output == 0.55:
            assert len(found.kinds) > 2


def test_a_lone_row_is_numbered_as_in_a_chunk():
    sequence = Sequence(planner().plan_at(CAPACITIES[0], PROMPT), PROMPT, MOST, False, None)
    numbering, expected = Numbering(), Numbering()
    in_turn = one_by_one(sequence, MOST, expected)
    for position in range(MOST):
        sequence.length = position
        assert sequence.number(numbering) == in_turn[position]
    assert numbering.kinds == expected.kinds


def test_plans_that_a_function_gives_are_numbered_too():
    made = planner()
    lean, whole = made.plan_at(CAPACITIES[0], PROMPT), made.pricing[Phase.PROMPT].dense
    sequence = Sequence(lean, PROMPT, MOST, False, None)
    sequence.number(Numbering())
    sequence._plan_at = lambda phase, position: whole if position % 3 else lean(phase, position)
    found, expected = Numbering(), Numbering()
    assert list(sequence.numbers(MOST, found)) == one_by_one(sequence, MOST, expected)
    assert found.kinds == expected.kinds and whole in {kind.plan for kind in found.kinds}


def test_a_stretch_is_looked_for_once():
    lean, asked = planner().plan_at(CAPACITIES[0], PROMPT), []

    def find(phase, position):
        asked.append(position)
        return lean.stretch(phase, position)

    sequence = Sequence(Plans(find), PROMPT, MOST, False, None)
    for position in range(PROMPT, MOST):
        sequence.length = position
        sequence.number(Numbering())
    assert asked == [PROMPT, *range(320, MOST, 64)]
