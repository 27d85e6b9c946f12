"""Promises of the knob: who wins, what is refused, and that a limit is told."""

import math

import pytest

from elastiformer import Capacity, CapacityError, UnitShares
from service.knob import Asked, Knob
from service.settings import Key
from tests.service.conftest import in_house

SERVER = Knob(Capacity(0.95, 0.95), {"low": Capacity(0.6, 0.6), "high": Capacity()})
KEY = Key("caller", Capacity(0.85, 0.85))
FORMS = {"body": 0.55, "alias": "0.65", "header": "0.75", "effort": "low"}
VALUES = [0.55, 0.65, 0.75, 0.6, 0.85, 0.95]


def resolve(knob=SERVER, key=None, lowest=0.5, **forms):
    return knob.resolve(Asked(**forms), key, lowest)


@pytest.mark.parametrize("given", range(len(VALUES)))
def test_body_wins_over_alias_over_header_over_effort_over_key_over_server(given):
    forms = dict(list(FORMS.items())[given:])
    found = resolve(key=KEY if given < 5 else None, **forms)
    assert found.applied == Capacity(VALUES[given], VALUES[given])
    assert found.requested == VALUES[given] and found.limited_by is None


@pytest.mark.parametrize("form", ["alias", "header"])
def test_text_forms_know_numbers_auto_and_objects(form):
    assert resolve(**{form: "auto"}).applied == SERVER.default
    assert resolve(**{form: '{"heads": 0.75}'}).applied.output == UnitShares(heads=0.75)
    assert resolve(**{form: '{"prompt": 0.6}'}).applied == Capacity(0.6, 1.0)
    for wrong in ("fast", "", "null", "NaN", "1.1", "0", "[" * 9999, "true", '"0.5"'):
        with pytest.raises(CapacityError):
            resolve(**{form: wrong})


def test_auto_is_the_servers_default_within_every_ceiling():
    found = resolve(body="auto")
    assert (found.requested, found.applied, found.limited_by) == ("auto", SERVER.default, None)
    assert found.tier == "auto"
    found = resolve(body="auto", key=Key("caller", None, 0.7))
    assert found.applied == Capacity(0.7, 0.7) and found.limited_by == "key"


def test_ceilings_come_last_and_are_told():
    strict = Knob(SERVER.default, SERVER.effort, ceiling=0.7)
    assert resolve(strict, body=0.6).limited_by is None
    found = resolve(strict, body=0.9)
    assert (found.requested, found.applied) == (0.9, Capacity(0.7, 0.7))
    assert found.limited_by == "server"
    found = resolve(strict, key=Key("caller", None, 0.6), body=0.9)
    assert found.applied == Capacity(0.6, 0.6) and found.limited_by == "key"
    found = resolve(strict, body={"prompt": 0.6, "output": 0.9})
    assert found.applied == Capacity(0.6, 0.7)
    # Shares per unit have no price before a plan is made: the ceiling takes their place.
    assert resolve(strict, body={"heads": 0.9}).applied == Capacity(0.7, 0.7)


def test_what_the_server_chose_itself_is_lifted_into_the_models_range():
    found = resolve(effort="low", lowest=0.8)
    assert found.applied == Capacity(0.8, 0.8) and found.limited_by == "model"
    found = resolve(Knob(ceiling=0.3), body=0.9, lowest=0.5)
    assert found.applied == Capacity(0.5, 0.5)
    # A caller's own number is never moved: the engine refuses it.
    assert resolve(body=0.3, lowest=0.8).applied == Capacity(0.3, 0.3)


def test_a_wrong_form_is_refused_even_where_another_one_wins():
    with pytest.raises(CapacityError, match="X-Elasti-Capacity"):
        resolve(body=0.6, header="fast")
    with pytest.raises(CapacityError, match=r"reasoning_effort.*low, high.*'extreme'"):
        resolve(body=0.6, effort="extreme")
    with pytest.raises(CapacityError):
        resolve(body=math.nan, header="0.6")


@pytest.mark.parametrize(
    ("body", "tier"),
    [(1.0, "1.0"), (0.99, "0.9"), (0.7, "0.7"), (0.6, "0.6"), (0.3, "0.3"), (0.05, "0.0"),
     ({"heads": 0.5}, "mixed"), ({"prompt": 0.5}, "mixed"), ("auto", "auto")],
)  # fmt: skip
def test_a_tier_is_the_capacity_rounded_down(body, tier):
    assert resolve(body=body).tier == tier


def test_the_knob_works_in_all_its_forms_over_http():
    async def visit(house):
        body = {"max_tokens": 2}
        forms = [
            (0.55, {"capacity": 0.55, "model": "tiny@0.65", "reasoning_effort": "low"}),
            (0.65, {"model": "tiny@0.65", "headers": {"X-Elasti-Capacity": "0.75"}}),
            (0.75, {"headers": {"X-Elasti-Capacity": "0.75"}, "reasoning_effort": "low"}),
            (0.6, {"reasoning_effort": "low"}),
            (0.9, {}),
            ({"prompt": 0.5, "output": 0.9}, {"capacity": {"prompt": 0.5, "output": 0.9}}),
            ({"heads": 0.75}, {"capacity": {"heads": 0.75, "experts": 1}}),
        ]
        for expected, form in forms:
            answer = await house.complete(**body, **form)
            assert answer["elasti"]["capacity_applied"] == expected
            assert answer["elasti"]["capacity_requested"] == expected
            assert answer["model"] == form.get("model", "tiny")
        labels = ["good", "bad"]
        for route, more in (("/v1/classify", {"input": "x"}), ("/predict", {"inputs": "x"})):
            reply = await house.post(route, **more, labels=labels, capacity=0.6)
            assert float(reply.headers["X-Elasti-Capacity-Spent"]) < 0.75

    in_house(visit, default_capacity=0.9)
