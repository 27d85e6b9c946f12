"""Promises of the scheduler: in order, within every limit, and nobody waits for ever."""

import random

import pytest

from elastiformer import Capacity
from service.errors import QueueFull
from service.pace import Pace
from service.rows import WORTH_WAITING, grouped
from service.scheduler import RUN_TOKENS, Entry, Group, Job, Limits, Scheduler, Share

MANY = 10**9


def entry(prompt=5, most_new=3, given=0, number=0, blocks=None, group=None, cut=0, scored=False):
    job = Job(
        number,
        tuple(range(prompt)),
        Capacity(),
        most_new,
        tuple(range(given)),
        scored,
        blocks=prompt + most_new if blocks is None else blocks,
        cut=cut,
    )
    return Entry(job, group)


def scheduler(waiting=8, running=4, step=6, cache=1000):
    return Scheduler(Limits(waiting, running, step, cache))


def run(shares):
    """What an engine does with its shares: all go through, finished prompts get a token."""
    for share in shares:
        share.entry.done += share.count
        if share.entry.ready == 0 and share.entry.job.most_new:
            share.entry.tokens.append(0)


def counts(shares):
    return [(share.entry, share.count) for share in shares]


def test_a_queue_takes_a_whole_request_or_nothing():
    queue = scheduler(waiting=3)
    queue.add([entry(), entry()])
    with pytest.raises(QueueFull, match=r"2 sequences wait.*at most 3.*2 more"):
        queue.add([entry(), entry()])
    assert len(queue.waiting) == 2


def test_places_and_cache_bound_what_runs_and_nobody_overtakes():
    queue = scheduler(running=3, cache=20)
    big, small, other, last = (entry(blocks=blocks) for blocks in (15, 12, 2, 2))
    queue.add([big, small, other, last])
    assert queue.admit() == [big]  # the small one does not fit beside it, and blocks the others
    assert queue.reserved_blocks == 15
    queue.remove(big)
    assert queue.admit() == [small, other, last]
    assert queue.reserved_blocks == 16
    for each in (small, other, last):
        queue.remove(each)
    assert queue.idle and queue.reserved_blocks == 0


def test_a_step_serves_every_decoding_job_first_and_prompts_with_the_rest():
    queue = scheduler(step=100)
    first, second, third = entry(80), entry(130), entry(3)
    queue.add([first, second, third])
    queue.admit()
    shares = queue.shares(MANY)
    assert counts(shares) == [(first, 80), (third, 3)]  # 17 left hold no run of the second
    run(shares)
    shares = queue.shares(MANY)
    assert counts(shares) == [(first, 1), (third, 1), (second, 96)]
    assert shares[2].ids == list(range(96))
    run(shares)
    assert counts(queue.shares(MANY)) == [(first, 1), (third, 1), (second, 34)]


def test_a_prompt_is_cut_between_runs_unless_it_would_stand_still():
    queue = scheduler(step=70)
    only = entry(200)
    queue.add([only])
    queue.admit()
    taken = []
    while only.ready > 1:
        taken.append(queue.shares(MANY)[0].count)
        run(queue.shares(MANY))
    assert taken == [64, 64, 64, 8]

    queue = scheduler(step=20)
    only = entry(50)
    queue.add([only])
    queue.admit()
    taken = []
    while only.ready > 1:
        taken.append(queue.shares(MANY)[0].count)
        run(queue.shares(MANY))
    assert taken == [20, 12, 18]


def test_a_step_ends_where_a_job_is_to_be_cut():
    queue = scheduler(step=500)
    cut, whole = entry(75, cut=64), entry(75)
    queue.add([cut, whole])
    queue.admit()
    shares = queue.shares(MANY)
    assert counts(shares) == [(cut, 64), (whole, 75)]
    run(shares)
    assert counts(queue.shares(MANY)) == [(whole, 1), (cut, 11)]


def test_prompts_beside_decodes_are_bounded_and_first_come_first_served():
    queue = scheduler(step=400)
    decoding, long, longer = entry(4), entry(300), entry(300)
    queue.add([decoding])
    queue.admit()
    run(queue.shares(0))  # alone, a prompt knows no bound
    queue.add([long, longer])
    queue.admit()
    assert counts(queue.shares(0)) == [(decoding, 1), (long, RUN_TOKENS)]
    assert counts(queue.shares(100)) == [(decoding, 1), (long, 96)]
    assert counts(queue.shares(MANY)) == [(decoding, 1), (long, 300), (longer, 96)]
    queue.remove(decoding)
    assert counts(queue.shares(0)) == [(long, 300), (longer, 96)]


def test_jobs_of_one_prompt_wait_for_the_first_of_them_and_others_pass():
    queue = scheduler(waiting=9, running=4, step=100)
    group = Group()
    first, second, third = (entry(100, group=group, number=n) for n in range(3))
    other, plain = entry(40, group=Group()), entry(100)
    queue.add([first, second, third, other, plain])
    assert queue.admit() == [first, other, plain]
    assert list(queue.waiting) == [second, third]
    run(queue.shares(MANY))
    queue.remove(plain)
    assert queue.admit() == [second, third]  # what can be stored is there, for all of them


@pytest.mark.parametrize("done", [0, 64])
def test_jobs_go_on_when_the_first_of_their_prompt_has_gone(done):
    queue = scheduler(running=2, step=64)
    group = Group()
    first, second, third = (entry(100, group=group) for _ in range(3))
    queue.add([first, second, third])
    queue.admit()
    first.done = done
    assert queue.admit() == []
    queue.remove(first)
    assert queue.admit() == [second]  # now it computes the prompt, and the third one waits for it
    assert queue.admit() == []
    second.done = 99  # all but the last token, which everyone runs
    assert queue.admit() == [third]


def test_only_several_jobs_of_one_prompt_that_is_worth_it_wait_for_each_other():
    long, short = (1,) * WORTH_WAITING + (2,), (3,) * WORTH_WAITING
    prompts = (long, short, long, short, (4,) * 99)
    entries = grouped([Job(n, prompt, Capacity(), 1) for n, prompt in enumerate(prompts)])
    assert entries[0].group is entries[2].group is not None
    assert [entry.group for entry in (entries[1], *entries[3:])] == [None] * 3
    assert all(
        each.group is None for each in grouped([Job(0, long, Capacity(), 1, scored=True)] * 2)
    )


def test_short_and_scored_prompts_are_nobodys_to_take_over():
    assert entry(RUN_TOKENS).job.storable_tokens == 0  # its last token is never stored
    assert entry(RUN_TOKENS + 1).job.storable_tokens == RUN_TOKENS
    assert entry(100, scored=True).job.storable_tokens == 0


def test_the_last_given_token_is_scored_and_not_run():
    given = entry(prompt=4, most_new=0, given=3)
    assert given.job.fed_tokens == 6 == given.job.most_tokens == given.ready
    assert entry(prompt=4, most_new=0, given=1).ready == 4


@pytest.mark.parametrize("step", [7, 40, 300])
def test_every_job_comes_to_its_end_within_the_budget(step):
    chance, groups = random.Random(0), [None, Group(), Group()]
    queue = scheduler(waiting=60, running=5, step=step, cache=220)
    jobs = [
        entry(
            chance.randrange(1, 180),
            chance.randrange(0, 9),
            number=number,
            group=chance.choice(groups),
        )
        for number in range(60)
    ]
    queue.add(jobs)
    finished = []
    for _ in range(6000):
        queue.admit()
        assert len(queue.running) <= 5 and queue.reserved_blocks <= 220
        shares = queue.shares(chance.choice([0, 50, MANY]))
        assert shares or queue.idle, "something always goes on"
        assert sum(share.count for share in shares) <= step
        run(shares)
        for each in list(queue.running):
            ended = each.done >= each.job.fed_tokens
            left = chance.random() < 0.01
            if left or (ended and each.generated_tokens == each.job.most_new):
                queue.remove(each)
                finished.append(each.job.number)
        if queue.idle:
            break
    assert sorted(finished) == list(range(60))


# The pace, by which the engine finds how many prompt tokens a step has time for.


def step_of(decoding=0, prompt=0):
    shares = [Share(entry(), 1) for _ in range(decoding)]
    return [*shares, Share(entry(prompt), prompt)] if prompt else shares


def test_the_pace_is_learned_from_steps():
    pace = Pace()
    assert pace.prompt_tokens(0.25) == 0  # nothing is known: as few as may be
    pace.learn(0.05, step_of(decoding=4))
    for tokens in (500, 64, 320):
        pace.learn(0.05 + 0.001 * tokens, step_of(4, tokens))
    assert pace.decode_seconds == pytest.approx(0.05)
    assert pace.seconds_per_prompt_token == pytest.approx(0.001)
    assert pace.prompt_tokens(0.25) == pytest.approx(200, abs=1)
    assert pace.prompt_tokens(0.04) == 0  # the decodes alone take longer


def test_the_pace_follows_what_changes_and_survives_a_slow_start():
    pace = Pace()
    pace.learn(9.0, step_of(prompt=500))
    for _ in range(8):
        pace.learn(0.001 * 32, step_of(prompt=32))
    assert pace.seconds_per_prompt_token == pytest.approx(0.001, rel=2)
    for _ in range(12):
        pace.learn(0.004 * 100, step_of(prompt=100))
    assert pace.seconds_per_prompt_token == pytest.approx(0.004, rel=0.05)


def test_a_clock_that_stands_still_breaks_no_pace():
    pace = Pace()
    pace.learn(0.0, step_of(3))
    pace.learn(0.0, step_of(3, 40))
    assert pace.prompt_tokens(0.25) > 10**6
