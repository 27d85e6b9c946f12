"""Health: does it work, is there room, who was refused or limited, and what is it that runs?"""

from __future__ import annotations

from deploy.dashboards.panels import Board, Kind, Panel, Query, Row, Scale
from deploy.dashboards.queries import grown, level, or_none, over, rate, series

ENDED = "elasti_request_success_total"
REFUSED = "elasti_admission_rejections_total"
OVERRIDDEN = "elasti_capacity_override_total"
RUNNING, WAITING = "elasti_num_requests_running", "elasti_num_requests_waiting"
CACHE = "elasti_kv_cache_usage_perc"
LOOKED_FOR, FOUND = "elasti_prefix_cache_queries_total", "elasti_prefix_cache_hits_total"
ERROR = 'finished_reason="error"'
INTERNAL, FORESEEN = 'reason="internal"', 'reason!="internal"'  # a mistake of ours, a refusal
UP = 'up{job=~"$job",instance=~"$instance"}'

REQUESTS = "elasti_e2e_request_latency_seconds_count"  # one for each request that ended
_ASKED_FOR = f"({grown(REQUESTS)} + {grown(REFUSED, without_model=True)})"
_MISTAKES = or_none(grown(REFUSED, only=INTERNAL, without_model=True))
_FAILED = f"({grown(ENDED, only=ERROR)} + {_MISTAKES})"

_NOW = Row(
    "Now, and in the time shown",
    (
        Panel(
            "Servers that answer",
            "How many of the scraped servers answered the last time?",
            Kind.STAT,
            Scale.COUNT,
            (Query(f"sum({UP})"),),
            width=4,
        ),
        Panel(
            "Running",
            "How many sequences are in the running batches?",
            Kind.STAT,
            Scale.COUNT,
            (Query(level(RUNNING)),),
            width=4,
        ),
        Panel(
            "Waiting",
            "How many sequences are accepted and not yet in a batch?",
            Kind.STAT,
            Scale.COUNT,
            (Query(level(WAITING)),),
            width=4,
        ),
        Panel(
            "Fullest cache",
            "How full is the fullest key-value cache? At 1 new sequences wait.",
            Kind.STAT,
            Scale.SHARE,
            (Query(f"max({series(CACHE)})"),),
            width=4,
            alarm=0.95,
        ),
        Panel(
            "Ended in an error",
            "Which share of what ended in the time shown failed by our fault: sequences in the "
            "engine, and requests on an error that nobody foresaw, of whichever model?",
            Kind.STAT,
            Scale.SHARE,
            (Query(over(_FAILED, f"({grown(ENDED)} + {_MISTAKES})")),),
            width=4,
            alarm=0.01,
        ),
        Panel(
            "Refused",
            "Which share of all requests in the time shown was refused before any work? Without "
            "those that failed on an error of ours.",
            Kind.STAT,
            Scale.SHARE,
            (Query(over(grown(REFUSED, only=FORESEEN, without_model=True), _ASKED_FOR)),),
            width=4,
            alarm=0.05,
        ),
    ),
)

_RATES = Row(
    "Rates",
    (
        Panel(
            "Sequences that ended, by why",
            "How much is done, and how does it end: stop, length, abort (the caller left), error?",
            Kind.AREAS,
            Scale.PER_SECOND,
            (Query(rate(ENDED, "finished_reason"), "{{finished_reason}}"),),
        ),
        Panel(
            "Sequences that ended, by model",
            "Which model is asked most?",
            Kind.AREAS,
            Scale.PER_SECOND,
            (Query(rate(ENDED, "model_name"), "{{model_name}}"),),
        ),
        Panel(
            "Tokens",
            "How many tokens come in as prompts, and how many go out?",
            Kind.LINES,
            Scale.PER_SECOND,
            (
                Query(rate("elasti_prompt_tokens_total"), "prompt"),
                Query(rate("elasti_generation_tokens_total"), "generated"),
            ),
        ),
    ),
)

_ERRORS = Row(
    "Errors",
    (
        Panel(
            "Share that ended in an error, by model",
            "Does a model fail, and how often?",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    over(
                        rate(ENDED, "model_name", ERROR),
                        rate(ENDED, "model_name"),
                    ),
                    "{{model_name}}",
                ),
            ),
            width=12,
        ),
        Panel(
            "Failed on an error that nobody foresaw",
            "Does the server itself make mistakes, before an engine is asked or while an answer is "
            "written? The caller gets 500, the log has the stack. No model is known here.",
            Kind.LINES,
            Scale.PER_SECOND,
            (Query(rate(REFUSED, "reason", INTERNAL, without_model=True), "{{reason}}"),),
            width=12,
        ),
        Panel(
            "Refused by a model, by why",
            "Is there too little room (queue_full), does a server stop (draining), or has an "
            "engine died (dead)?",
            Kind.LINES,
            Scale.PER_SECOND,
            (
                Query(
                    rate(REFUSED, "model_name,reason", 'model_name!=""'),
                    "{{model_name}}: {{reason}}",
                ),
            ),
            width=12,
        ),
        Panel(
            "Refused at the door, by why",
            "Do callers ask wrongly: without a key, for a model that is not there, with a bad "
            "value, too much at once? No model is known here, so the choice of model is not used.",
            Kind.LINES,
            Scale.PER_SECOND,
            (
                Query(
                    rate(REFUSED, "reason", f'model_name="",{FORESEEN}', without_model=True),
                    "{{reason}}",
                ),
            ),
            width=12,
        ),
    ),
)

_QUEUE = Row(
    "Queue",
    (
        Panel(
            "Running, by model",
            "How big are the batches?",
            Kind.LINES,
            Scale.COUNT,
            (Query(level(RUNNING, "model_name"), "{{model_name}}"),),
            width=12,
        ),
        Panel(
            "Waiting, by model",
            "Is a queue growing?",
            Kind.LINES,
            Scale.COUNT,
            (Query(level(WAITING, "model_name"), "{{model_name}}"),),
            width=12,
        ),
    ),
)

_CACHE = Row(
    "Cache",
    (
        Panel(
            "Key-value cache in use, by model",
            "Is there room for more sequences? The fullest server of each model; 1 is full.",
            Kind.LINES,
            Scale.SHARE,
            (Query(f"max by (model_name) ({series(CACHE)})", "{{model_name}}"),),
        ),
        Panel(
            "Prefix hits, by model",
            "Which share of the prompt tokens was found among stored beginnings, and cost nothing?",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    over(rate(FOUND, "model_name"), rate(LOOKED_FOR, "model_name")),
                    "{{model_name}}",
                ),
            ),
        ),
        Panel(
            "Prefix tokens",
            "How many prompt tokens are looked for among stored beginnings, and how many found?",
            Kind.LINES,
            Scale.PER_SECOND,
            (Query(rate(LOOKED_FOR), "looked for"), Query(rate(FOUND), "found")),
        ),
    ),
)

_LIMITS = Row(
    "Limits on capacity",
    (
        Panel(
            "Overrides per second, by whose limit",
            "Do requests get another capacity than they ask for, and because of what: their key's "
            "ceiling, the server's, or the lowest that the model can do?",
            Kind.LINES,
            Scale.PER_SECOND,
            (Query(rate(OVERRIDDEN, "reason"), "{{reason}}"),),
        ),
        Panel(
            "Share of requests overridden",
            "Is the exception the rule?",
            Kind.LINES,
            Scale.SHARE,
            (
                Query(
                    over(
                        rate(OVERRIDDEN, "model_name"),
                        rate(REQUESTS, "model_name"),
                    ),
                    "{{model_name}}",
                ),
            ),
        ),
        Panel(
            "Ceiling, by model",
            "What is the most that a server grants now, whatever is asked? The lowest of them.",
            Kind.LINES,
            Scale.CAPACITY,
            (
                Query(
                    f"min by (model_name) ({series('elasti_load_capacity_ceiling')})",
                    "{{model_name}}",
                ),
            ),
        ),
    ),
)

_WHAT = Row(
    "What runs",
    (
        Panel(
            "Models and adapters",
            "Which base model and which adapter stand behind each name, on each server?",
            Kind.TABLE,
            Scale.COUNT,
            (
                Query(
                    "max by (job, instance, model_name, base, adapter) "
                    f"({series('elasti_adapter_info')})"
                ),
            ),
            width=16,
        ),
        Panel(
            "Engines alive",
            "Has a model's engine died on a server? Then it is at 0, and every "
            "request for that model is refused.",
            Kind.LINES,
            Scale.COUNT,
            (
                Query(
                    f"min by (instance, model_name) ({series('elasti_engine_alive')})",
                    "{{model_name}} on {{instance}}",
                ),
            ),
        ),
        Panel(
            "Builds",
            "Which build runs on each server, over which releases? Is there one that an upgrade "
            "has left behind?",
            Kind.TABLE,
            Scale.COUNT,
            (
                Query(
                    "max by (job, instance, version, build, python, torch, transformers) "
                    f"({series('elasti_build_info', without_model=True)})"
                ),
            ),
            width=16,
        ),
        Panel(
            "Servers that answer, over time",
            "Since when has a server not answered?",
            Kind.LINES,
            Scale.COUNT,
            (Query(UP, "{{instance}}"),),
        ),
    ),
)

HEALTH = Board(
    "health",
    "Elastiformer: Health",
    "Does it work, is there room, who was refused or limited, and what is it that runs?",
    (_NOW, _RATES, _ERRORS, _QUEUE, _CACHE, _LIMITS, _WHAT),
)
