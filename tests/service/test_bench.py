"""Promises of the bench: turns are fair, an end is one's own, and CPU models share one thread."""

import asyncio
import threading
from contextlib import nullcontext

import torch

from service.app import create_app
from service.bench import Bench, apart, helpers
from service.metrics import Metrics
from service.served import Catalogue, load, serve
from service.settings import ModelSpec, Settings
from tests.service.conftest import Watched, elastic_model, opened

TURNS = 50


class Clerk:
    """Works off its turns, then waits to be sent home; writes each turn in a diary."""

    def __init__(self, bench, diary):
        self.bench, self.diary, self.left, self.goes_home = bench, diary, TURNS, False

    @property
    def has_work(self):
        return self.left > 0 or self.goes_home

    def take_turn(self):
        self.diary.append((self, threading.get_ident()))
        self.left -= 1
        return self.left > 0 or not self.goes_home

    def resting(self):
        return nullcontext()

    def go_home(self):
        with self.bench.wake:
            self.goes_home = True
            self.bench.wake.notify_all()
        self.bench.wait_for_end(self)


def test_turns_are_fair_and_the_thread_ends_with_the_last_worker():
    bench, diary = Bench("a bench"), []
    clerks = [Clerk(bench, diary), Clerk(bench, diary)]
    with bench.wake:  # nobody begins before both are there
        for clerk in clerks:
            bench.add(clerk)
    for clerk in clerks:
        clerk.go_home()
        assert not bench.holds(clerk)
    assert len({thread for _, thread in diary}) == 1
    names = [clerks.index(clerk) for clerk, _ in diary[: 2 * TURNS]]
    assert names == [0, 1] * TURNS, "they did not take turns"
    late = Clerk(bench, diary)  # the thread begins anew
    bench.add(late)
    late.go_home()
    assert sum(clerk is late for clerk, _ in diary) >= 1


def test_one_engine_dies_alone_and_its_neighbour_goes_on():
    class Dying(Watched):
        def step(self, chunks):
            raise SystemExit("out of order")

    bench, metrics, settings = Bench("shared"), Metrics(), Settings()
    catalogue = Catalogue(
        serve(ModelSpec(name, "tiny-llama"), model, settings, metrics, bench=bench)
        for name, model in {"tiny": elastic_model(), "ill": Dying()}.items()
    )

    async def talk():
        asked = {"prompt": "a", "max_tokens": 5}
        async with opened(create_app(settings, catalogue, metrics)) as house:
            assert (await house.post("/v1/completions", **asked, model="ill")).status_code == 503
            assert (await house.post("/v1/completions", **asked)).status_code == 200
            assert [served.engine.alive for served in catalogue] == [True, False]

    asyncio.run(talk())


def test_what_is_loaded_for_a_cpu_shares_a_bench_and_leaves_no_thread_behind(tiny_folder):
    before = set(threading.enumerate())
    models = [f"{name}={tiny_folder}" for name in ("one", "two")]
    catalogue = load(Settings(models=models, dtype="float32", cache_tokens=256), Metrics())
    assert set(threading.enumerate()) == before
    one, two = (served.engine for served in catalogue)
    assert one._bench is two._bench


def test_threads_beside_the_loop_have_no_pool_and_loading_has_all_of_them():
    threads = torch.get_num_threads()

    class Counting(Clerk):
        def take_turn(self):
            self.diary.append(torch.get_num_threads())
            return False

    bench, diary = Bench("a bench"), []
    with helpers() as beside:
        assert beside.submit(torch.get_num_threads).result() == 1
        assert apart(torch.get_num_threads) == torch.get_num_threads() == threads
        counting = Counting(bench, diary)
        bench.add(counting)
        bench.wait_for_end(counting)
        assert diary == [threads]
