"""Promises of the scheduler: in order, within every limit, and nobody waits for ever."""

import random

import pytest

from elastiformer import Capacity
from service.errors import QueueFull
from service.scheduler import Entry, Job, Limits, Scheduler


def entry(prompt=5, most_new=3, given=0, number=0):
    return Entry(Job(number, tuple(range(prompt)), Capacity(), most_new, tuple(range(given))))


def scheduler(waiting=8, running=4, step=6, cache=100):
    return Scheduler(Limits(waiting, running, step, cache))


def run(shares):
    """What an engine does with its shares: all go through, finished prompts get a token."""
    for share in shares:
        share.entry.done += share.count
        if share.entry.ready == 0 and share.entry.job.most_new:
            share.entry.tokens.append(0)


def test_a_queue_takes_a_whole_request_or_nothing():
    queue = scheduler(waiting=3)
    queue.add([entry(), entry()])
    with pytest.raises(QueueFull, match=r"2 sequences wait.*at most 3.*2 more"):
        queue.add([entry(), entry()])
    assert len(queue.waiting) == 2


def test_places_and_cache_bound_what_runs_and_nobody_overtakes():
    queue = scheduler(running=3, cache=20)
    big, small, other, last = entry(10, 5), entry(9, 3), entry(1, 1), entry(1, 1)
    queue.add([big, small, other, last])
    assert queue.admit() == [big]  # the small one does not fit beside it, and blocks the others
    assert queue.reserved_tokens == 15
    queue.remove(big)
    assert queue.admit() == [small, other, last]
    assert queue.reserved_tokens == 16
    for each in (small, other, last):
        queue.remove(each)
    assert queue.idle and queue.reserved_tokens == 0


def test_a_step_serves_every_generating_job_first_and_prompts_with_the_rest():
    queue = scheduler(step=6)
    first, second, third = entry(4), entry(9), entry(3)
    queue.add([first, second, third])
    queue.admit()
    shares = queue.shares()
    assert [(share.entry, share.count) for share in shares] == [(first, 4), (second, 2)]
    assert shares[1].ids == [0, 1]
    run(shares)
    shares = queue.shares()
    assert [(share.entry, share.count) for share in shares] == [(first, 1), (second, 5)]
    assert shares[1].ids == [2, 3, 4, 5, 6]


def test_the_last_given_token_is_scored_and_not_run():
    given = entry(prompt=4, most_new=0, given=3)
    assert given.job.fed_tokens == 6 == given.job.most_tokens == given.ready
    assert entry(prompt=4, most_new=0, given=1).ready == 4


def test_every_job_comes_to_its_end_within_the_budget():
    chance = random.Random(0)
    queue = scheduler(waiting=60, running=5, step=7, cache=60)
    jobs = [entry(chance.randrange(1, 40), chance.randrange(0, 9), number=n) for n in range(60)]
    queue.add(jobs)
    finished = []
    for _ in range(2000):
        queue.admit()
        assert len(queue.running) <= 5 and queue.reserved_tokens <= 60
        shares = queue.shares()
        assert sum(share.count for share in shares) <= 7
        run(shares)
        for each in list(queue.running):
            if each.done >= each.job.fed_tokens and each.generated_tokens == each.job.most_new:
                queue.remove(each)
                finished.append(each.job.number)
        if queue.idle:
            break
    assert sorted(finished) == list(range(60))
