"""Savings: what was left out, what it would have cost, and whether callers got what they asked."""

from __future__ import annotations

from deploy.dashboards.money import DENSE_FLOPS, FLOPS, MONEY
from deploy.dashboards.panels import Board, Kind, Panel, Query, Row, Scale
from deploy.dashboards.queries import (
    buckets,
    grown,
    left_of,
    mean,
    or_none,
    over,
    per_request,
    rate,
    some,
)

PARAMETERS, DENSE_PARAMETERS = "elasti_parameters_used_total", "elasti_dense_parameters_total"
DECISIONS, LEFT_OUT = "elasti_router_tokens_total", "elasti_router_tokens_skipped_total"
REQUESTS = "elasti_e2e_request_latency_seconds_count"  # one for each request that ended
ENERGY, GENERATED = "elasti_energy_joules_total", "elasti_generation_tokens_total"
TOKENS = 'unit=~"attention_tokens|mlp_tokens|image_tokens"'
BELOW = 'tier!~"1[.]0|auto"'

_NOT_BY_UNIT = (
    "Not by unit: units lie inside each other (a head of a token that is left out costs nothing "
    "already), so a unit's part would hang on which of them is taken first. What each unit left "
    "out is counted in decisions, below."
)

_TOTALS = Row(
    "In the time shown",
    (
        Panel(
            "FLOPs saved",
            "Of the FLOPs that the pretrained models would have run, which share was left out?",
            Kind.STAT,
            Scale.SHARE,
            (Query(left_of(grown(FLOPS), grown(DENSE_FLOPS))),),
            width=4,
        ),
        Panel(
            "Parameters left out",
            "Of the parameters that the pretrained models would have touched, once per token, "
            "which share was not read?",
            Kind.STAT,
            Scale.SHARE,
            (Query(left_of(grown(PARAMETERS), grown(DENSE_PARAMETERS))),),
            width=4,
        ),
        Panel(
            "Dense would have cost",
            "How many FLOPs would the pretrained models have run for the same tokens: what would "
            "you have paid without capacities?",
            Kind.STAT,
            Scale.FLOPS,
            (Query(grown(DENSE_FLOPS)),),
            width=4,
        ),
        Panel(
            "Spent",
            "How many FLOPs ran: what did you pay?",
            Kind.STAT,
            Scale.FLOPS,
            (Query(grown(FLOPS)),),
            width=4,
        ),
        Panel(
            "Not spent",
            "How many FLOPs did nobody have to pay for?",
            Kind.STAT,
            Scale.FLOPS,
            (Query(f"{grown(DENSE_FLOPS)} - {grown(FLOPS)}"),),
            width=4,
        ),
        Panel(
            "Requests below 1.0",
            "Which share of the requests ran below capacity 1.0? Those that asked for 'auto' "
            "are not counted as such, whatever they were given.",
            Kind.STAT,
            Scale.SHARE,
            (Query(over(or_none(grown(REQUESTS, only=BELOW)), grown(REQUESTS))),),
            width=4,
        ),
    ),
)

_SHARES = Row(
    "Share saved",
    (
        Panel(
            "FLOPs saved, by model",
            f"Which model saves which share of its dense FLOPs? {_NOT_BY_UNIT}",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    left_of(rate(FLOPS, "model_name"), rate(DENSE_FLOPS, "model_name")),
                    "{{model_name}}",
                ),
            ),
        ),
        Panel(
            "FLOPs saved, by capacity tier",
            "Does each tier save what it promises: about 0.4 in tier 0.6? The output head and the "
            "last layer count too, so no tier is exactly on its number.",
            Kind.LINES,
            Scale.SHARE,
            (Query(left_of(rate(FLOPS, "tier"), some(rate(DENSE_FLOPS, "tier"))), "{{tier}}"),),
        ),
        Panel(
            "Parameters left out, by model",
            "Which model reads which share less of its weights, once per token?",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    left_of(rate(PARAMETERS, "model_name"), rate(DENSE_PARAMETERS, "model_name")),
                    "{{model_name}}",
                ),
            ),
        ),
    ),
)

_BILL = Row(
    "What would have been paid",
    (
        Panel(
            "FLOPs per second: spent, and dense",
            "How much compute runs, and how much would run if every request were dense?",
            Kind.LINES,
            Scale.FLOPS_PER_SECOND,
            (
                Query(rate(DENSE_FLOPS), "dense would be"),
                Query(rate(FLOPS), "spent"),
            ),
        ),
        Panel(
            "FLOPs per request: spent, and dense",
            "What does a request cost on average, and what would it cost dense?",
            Kind.LINES,
            Scale.FLOPS,
            (
                Query(over(rate(DENSE_FLOPS), rate(REQUESTS)), "dense would be"),
                Query(over(rate(FLOPS), rate(REQUESTS)), "spent"),
            ),
        ),
        Panel(
            "FLOPs per second not spent, by model",
            "Which model's requests save the most compute in absolute terms?",
            Kind.AREAS,
            Scale.FLOPS_PER_SECOND,
            (
                Query(
                    f"{rate(DENSE_FLOPS, 'model_name')} - {rate(FLOPS, 'model_name')}",
                    "{{model_name}}",
                ),
            ),
        ),
    ),
)

_TOKENS = Row(
    "Tokens left out",
    (
        Panel(
            "Left out per second, by unit",
            "What is left out, and how often? A decision is taken per token, layer and thing: one "
            "token counts once in each layer, and for heads, experts and channels once for each.",
            Kind.LINES,
            Scale.PER_SECOND,
            (Query(rate(LEFT_OUT, "unit"), "{{unit}}"),),
            logarithmic=True,  # there are hundreds of channels to a token
        ),
        Panel(
            "Share left out, by unit and phase",
            "Of the decisions about each unit, which share is to leave out: for tokens of which "
            "only keys and values are needed (prompt), and for those whose logits are (output)?",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    over(rate(LEFT_OUT, "unit,phase"), some(rate(DECISIONS, "unit,phase"))),
                    "{{unit}}, {{phase}}",
                ),
            ),
        ),
        Panel(
            "Tokens left out per second, by model and unit",
            "Which model skips how many tokens around attention and around the MLP, once per "
            "layer, and how many image tokens?",
            Kind.LINES,
            Scale.PER_SECOND,
            (Query(rate(LEFT_OUT, "model_name,unit", TOKENS), "{{model_name}}: {{unit}}"),),
        ),
        Panel(
            "Left out per request, by unit",
            "How much of each unit does an average request leave out, counted in decisions as on "
            "the left above?",
            Kind.LINES,
            Scale.COUNT,
            (Query(per_request(rate(LEFT_OUT, "unit"), rate(REQUESTS)), "{{unit}}"),),
            logarithmic=True,
        ),
        Panel(
            "Tokens left out per request, by model and unit",
            "How many tokens does an average request to each model leave out around attention and "
            "around the MLP, once per layer, and how many image tokens?",
            Kind.LINES,
            Scale.COUNT,
            (
                Query(
                    mean("elasti_tokens_skipped_per_request", "model_name,unit"),
                    "{{model_name}}: {{unit}}",
                ),
            ),
        ),
        Panel(
            "Tokens left out in a request",
            "Is it a few requests that leave out much, or all of them a little? Each request is "
            "counted once per unit of tokens: around attention, around the MLP, and image tokens.",
            Kind.HEATMAP,
            Scale.COUNT,
            (Query(buckets("elasti_tokens_skipped_per_request"), "{{le}}"),),
        ),
    ),
)

_PARAMETERS = Row(
    "Parameters left out",
    (
        Panel(
            "Parameters left out per second, by model",
            f"How much of each model's weights is not worked with, once per token? {_NOT_BY_UNIT}",
            Kind.LINES,
            Scale.PER_SECOND,
            (
                Query(
                    f"{rate(DENSE_PARAMETERS, 'model_name')} - {rate(PARAMETERS, 'model_name')}",
                    "{{model_name}}",
                ),
            ),
        ),
        Panel(
            "Parameters left out per request, by model",
            "How much of the weights does an average request not touch, once per token?",
            Kind.LINES,
            Scale.COUNT,
            (Query(mean("elasti_parameters_skipped_per_request", "model_name"), "{{model_name}}"),),
        ),
        Panel(
            "Parameters left out in a request",
            "Is it a few requests that leave out much, or all of them a little?",
            Kind.HEATMAP,
            Scale.COUNT,
            (Query(buckets("elasti_parameters_skipped_per_request"), "{{le}}"),),
        ),
    ),
)

_ASKED = Row(
    "Asked and spent",
    (
        Panel(
            "Capacity asked for",
            "Which capacities do callers ask for? Only requests that name a single number.",
            Kind.HEATMAP,
            Scale.CAPACITY,
            (Query(buckets("elasti_request_capacity"), "{{le}}"),),
        ),
        Panel(
            "Capacity spent",
            "Which capacities were really spent? It should look like the one beside it; 'auto', "
            "keep shares and dense requests come on top.",
            Kind.HEATMAP,
            Scale.CAPACITY,
            (Query(buckets("elasti_request_capacity_spent"), "{{le}}"),),
        ),
        Panel(
            "Mean capacity: asked, and spent",
            "Do requests spend what they ask for, on average? Overrides and 'auto' pull the two "
            "apart.",
            Kind.LINES,
            Scale.CAPACITY,
            (
                Query(mean("elasti_request_capacity"), "asked"),
                Query(mean("elasti_request_capacity_spent"), "spent"),
            ),
        ),
        Panel(
            "Requests per second, by capacity tier",
            "Which capacities were requests given, rounded down to 0.1? 'mixed': another one per "
            "phase, or keep shares.",
            Kind.AREAS,
            Scale.PER_SECOND,
            (Query(some(rate(REQUESTS, "tier")), "{{tier}}"),),
            width=12,
        ),
        Panel(
            "Share of requests below 1.0, by model",
            "Who uses the knob? Those that asked for 'auto' are not counted as below 1.0.",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    over(
                        rate(REQUESTS, "model_name", BELOW),
                        rate(REQUESTS, "model_name"),
                    ),
                    "{{model_name}}",
                ),
            ),
            width=12,
        ),
    ),
)

_ENERGY = Row(
    "Energy, where the GPU's counter can be read",
    (
        Panel(
            "Energy in the time shown",
            "How much energy did requests take?",
            Kind.STAT,
            Scale.JOULES,
            (Query(grown(ENERGY)),),
        ),
        Panel(
            "Power, by tier",
            "Which requests take the energy?",
            Kind.AREAS,
            Scale.WATTS,
            (Query(some(rate(ENERGY, "tier")), "{{tier}}"),),
        ),
        Panel(
            "Energy per generated token, by model",
            "What does a token cost? All of it is counted here: prompts, and classification too.",
            Kind.LINES,
            Scale.JOULES,
            (
                Query(
                    over(rate(ENERGY, "model_name"), rate(GENERATED, "model_name")),
                    "{{model_name}}",
                ),
            ),
        ),
    ),
    may_lack=True,
)

SAVINGS = Board(
    "savings",
    "Elastiformer: Savings",
    "What was left out, what dense would have cost, and whether callers got what they asked for.",
    (_TOTALS, _SHARES, _BILL, MONEY, _TOKENS, _PARAMETERS, _ASKED, _ENERGY),
)
