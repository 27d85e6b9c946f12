"""What was planned for good, held against a server for long: is the promise kept below that rate,
and broken above it?

A burst ends before a queue that grows slowly is felt. Here requests come for minutes, and only
those count that come after a warm-up, when the server is as busy as it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.check import Held, Planned, median_ms, times_or_late
from benchmarks.sender import Phase, Sender
from benchmarks.simulation import Host, Promise, moments, poisson, simulate
from service.scheduler import Job
from training.progress import track

BELOW, ABOVE = 0.85, 1.15  # times the planned rate: held at the one, broken at the other
_SEED = 200  # of the moments; none of those that are planned or checked with


def hold(
    planned: Planned,
    host: Host,
    jobs: Sequence[Job],
    mix: Sequence[float],
    promise: Promise,
    sender: Sender,
    window_seconds: float,
    warm_up_seconds: float,
    windows: int,
) -> Planned:
    """Below and above the planned rate; each window more halves what lies between the two."""
    around = planned.rate or planned.saturated  # where nothing is held, the most there is
    # Who has no answer by then was not served in time, however long one waits for it.
    most_tokens = max(job.most_new for job in jobs)
    patience = promise.first_token_seconds + promise.between_tokens_seconds * most_tokens
    sent_for = warm_up_seconds + window_seconds
    held: list[Held] = []
    low, high = BELOW, ABOVE
    for at in track(range(windows), label=f"{planned.mode}, for long"):
        part = (BELOW, ABOVE)[at] if at < 2 else (low + high) / 2
        rate = round(part * around, 3)
        when = moments(rate, sent_for, _SEED + at)
        phase = sender.at(when, mix, sent_for + patience)
        arrivals = poisson(jobs, rate, sent_for, _SEED + at)
        paper = simulate(host, arrivals, sent_for + patience)
        # Both have the same moments in the same order.
        first = sum(moment < warm_up_seconds for moment in when)
        counted = Phase(window_seconds, phase.requests[first:])
        held.append(
            Held(
                part=part,
                rate=rate,
                sent=len(counted.requests),
                finished=len(counted.finished),
                failed=sum(each.failed for each in counted.requests),
                kept=promise.share_kept(map(times_or_late, counted.requests)),
                kept_on_paper=promise.share_kept(map(times_or_late, paper[first:])),
                first_token_ms=median_ms([each.to_first_token for each in counted.requests]),
            )
        )
        if at >= 1:
            kept = {each.part: each.kept >= promise.share for each in held}
            if not kept[BELOW] or kept[ABOVE]:
                break  # what is looked for does not lie between
            low = max(part for part, is_kept in kept.items() if is_kept)
            high = min(part for part, is_kept in kept.items() if not is_kept and part > low)
    return replace(planned, held=tuple(sorted(held, key=lambda each: each.rate)))
