"""Latency: how long callers wait, and whether a lower capacity is really faster."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.dashboards.panels import Board, Kind, Panel, Query, Row, Scale
from deploy.dashboards.queries import buckets, quantile, quantile_of_all


@dataclass(frozen=True, slots=True)
class Wait:
    """One kind of waiting."""

    title: str
    histogram: str
    question: str  # goes on with "for half of them?"


WAITS = (
    Wait(
        "First token",
        "elasti_time_to_first_token_seconds",
        "How long do callers look at nothing",
    ),
    Wait(
        "Between tokens",
        "elasti_inter_token_latency_seconds",
        "How long is it from one token to the next",
    ),
    Wait(
        "End to end",
        "elasti_e2e_request_latency_seconds",
        "How long does a request take, from accepting it to its last token",
    ),
    Wait(
        "Queue",
        "elasti_request_queue_time_seconds",
        "How long do sequences wait for their first step, for want of room",
    ),
)


def _total(wait: Wait) -> Panel:
    return Panel(
        f"{wait.title}: 95 %",
        f"{wait.question}, for all but the slowest 5 % in the time shown?",
        Kind.STAT,
        Scale.SECONDS,
        (Query(quantile_of_all(0.95, wait.histogram)),),
        width=6,
    )


def _row(wait: Wait) -> Row:
    return Row(
        wait.title,
        (
            Panel(
                f"{wait.title}: half, by capacity tier",
                f"{wait.question}, for half of them? Is a lower capacity faster?",
                Kind.LINES,
                Scale.SECONDS,
                (Query(quantile(0.5, wait.histogram, "tier"), "{{tier}}"),),
            ),
            Panel(
                f"{wait.title}: 95 %, by capacity tier",
                f"{wait.question}, for all but the slowest 5 %?",
                Kind.LINES,
                Scale.SECONDS,
                (Query(quantile(0.95, wait.histogram, "tier"), "{{tier}}"),),
            ),
            Panel(
                f"{wait.title}: all tiers",
                f"{wait.question}: alike for all, or are there two kinds of callers?",
                Kind.HEATMAP,
                Scale.SECONDS,
                (Query(buckets(wait.histogram), "{{le}}"),),
            ),
        ),
    )


LATENCY = Board(
    "latency",
    "Elastiformer: Latency",
    "How long callers wait: for the first token, between tokens, in all and in the queue, by tier.",
    (
        Row("In the time shown", tuple(_total(wait) for wait in WAITS)),
        *(_row(wait) for wait in WAITS),
    ),
)
