"""How many examples a property-based test draws: a few that are the same each time, or many new.

`ELASTI_TEST_EXAMPLES=2000 pytest --timeout 0 tests/elastiformer/test_any_mix.py` looks for long.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

MANY = os.environ.get("ELASTI_TEST_EXAMPLES")


def examples(few: int) -> settings:
    """Settings for a test that needs only `few` examples to be worth its time."""
    return settings(
        max_examples=int(MANY) if MANY else few,
        derandomize=MANY is None,  # what passed once passes again
        deadline=None,
        print_blob=True,
        phases=[phase for phase in Phase if phase is not Phase.explain],  # takes minutes
        suppress_health_check=[HealthCheck.too_slow],
    )
