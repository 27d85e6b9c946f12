"""What was paid and what dense would have cost, in money: FLOPs at a price that is written in."""

from __future__ import annotations

from deploy.dashboards.panels import Kind, Panel, Query, Row, Scale
from deploy.dashboards.queries import grown, money, money_per_hour, rate, some

FLOPS, DENSE_FLOPS = "elasti_flops_total", "elasti_dense_flops_total"
_PRICED = (
    "At the price of an exaFLOP (10^18 FLOPs) that is written above, so as far as what you pay "
    "follows FLOPs; the operator's guide says how to find it from the price of a GPU-hour."
)

MONEY = Row(
    "What would have been paid, in money",
    (
        Panel(
            "Dense would have cost, in money",
            f"What would the time shown have cost at capacity 1.0? {_PRICED}",
            Kind.STAT,
            Scale.MONEY,
            (Query(money(grown(DENSE_FLOPS))),),
        ),
        Panel(
            "Spent, in money",
            f"What did the time shown cost? {_PRICED}",
            Kind.STAT,
            Scale.MONEY,
            (Query(money(grown(FLOPS))),),
        ),
        Panel(
            "Not spent, in money",
            f"How much money did capacities below 1.0 save in the time shown? {_PRICED}",
            Kind.STAT,
            Scale.MONEY,
            (Query(money(f"{grown(DENSE_FLOPS)} - {grown(FLOPS)}")),),
        ),
        Panel(
            "Money per hour: spent, and dense",
            f"What does an hour cost, and what if every request were dense? {_PRICED}",
            Kind.LINES,
            Scale.MONEY,
            (
                Query(money_per_hour(rate(DENSE_FLOPS)), "dense would be"),
                Query(money_per_hour(rate(FLOPS)), "spent"),
            ),
        ),
        Panel(
            "Money per hour not spent, by model",
            f"Which model's requests save the most money? {_PRICED}",
            Kind.AREAS,
            Scale.MONEY,
            (
                Query(
                    money_per_hour(
                        f"{rate(DENSE_FLOPS, 'model_name')} - {rate(FLOPS, 'model_name')}"
                    ),
                    "{{model_name}}",
                ),
            ),
        ),
        Panel(
            "Money per hour not spent, by capacity tier",
            f"Which capacities save the most money? {_PRICED}",
            Kind.AREAS,
            Scale.MONEY,
            (
                Query(
                    money_per_hour(f"{some(rate(DENSE_FLOPS, 'tier'))} - {rate(FLOPS, 'tier')}"),
                    "{{tier}}",
                ),
            ),
        ),
    ),
)
