from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from pipeline.shards.fetch import hosts as module
from pipeline.shards.fetch.budget import Budget
from pipeline.shards.fetch.hosts import FAILURES, STRIKES, Host, Hosts, backoff, retry_after
from pipeline.shards.fetch.queue import Queue


def test_retry_after_in_seconds_and_as_a_date() -> None:
    assert retry_after("120") == 120 and retry_after(" 0 ") == 0
    assert retry_after(None) is None and retry_after("soon") is None and retry_after("-5") is None and retry_after("") is None
    later = datetime.now(UTC) + timedelta(hours=1)
    assert retry_after(format_datetime(later, usegmt=True)) == pytest.approx(3600, abs=60)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 99 Oct 2015 07:28:00 GMT") is None
    for endless in (f"Wed, 21 Oct {10**20} 07:28:00 GMT", f"Wed, 21 Oct 2015 07:28:00 +{10**20}"):
        assert retry_after(endless) is None


def test_pauses_double_vary_and_end_at_patience() -> None:
    for times in range(1, 8):
        drawn = [backoff(times, 1e9) for _ in range(200)]
        middle = 2.0 ** (times - 1)
        assert 0.5 * middle <= min(drawn) < 0.7 * middle and 1.3 * middle < max(drawn) <= 1.5 * middle
    assert backoff(10**6, 60) == 60


def test_a_host_is_asked_one_request_at_first_and_fewer_once_overloaded() -> None:
    host = Host()
    assert host.at_once == 1
    for _ in range(20):
        host.answer(80, per_host=8)
    assert host.at_once == 8
    host.overloaded(80, "http-429", 3.0, 60, now=100)
    assert host.at_once == 4 and host.not_before == 103
    host.overloaded(443, "http-429", 50.0, 60, now=101)  # was under way when the first one came
    assert host.at_once == 4 and host.not_before == 103
    host.overloaded(80, "http-429", 3600.0, 60, now=200)  # more than patience allows: as long as we would have waited ourselves
    assert 200 < host.not_before <= 200 + 3


def test_a_host_that_stays_overloaded_is_given_up_after_pauses_in_a_row() -> None:
    host, now = Host(), 0.0
    for n in range(STRIKES):
        assert host.given_up(80, now) is None, n
        host.overloaded(80, "http-503", None, 60, now)
        now = max(now, host.not_before) + 0.1
    assert host.given_up(80, now) == host.given_up(443, now) == "http-503" and host.given_up(80, now + 61) is None
    host = Host()
    for _ in range(10 * STRIKES):  # an answer between them
        host.overloaded(80, "http-503", 1.0, 60, now)
        now += 2
        host.answer(80, 8)
    assert host.given_up(80, now) is None
    for _ in range(STRIKES):
        host.overloaded(80, "http-429", 7200.0, 60, now)
        now = max(now, host.not_before) + 0.1
    assert host.given_up(80, now + 7100) == "http-429" and host.given_up(80, now + 7201) is None  # as long as it asked for at last


def test_a_dead_host_is_given_up_and_one_that_answers_at_times_is_not() -> None:
    dead, slow = Host(), Host()
    slow.answer(80, 8)
    for n in range(FAILURES):
        assert dead.given_up(80, 10 * n) is None
        for _ in range(8):  # at once: they count as one
            dead.no_answer(80, "timeout", connected=True, now=10 * n)
            slow.no_answer(80, "timeout", connected=True, now=10 * n)
    now = 10 * FAILURES
    assert dead.given_up(80, now) == "timeout" and slow.given_up(80, now) is None
    for n in range(FAILURES):
        slow.no_answer(80, "refused", connected=False, now=now + 10 * n)
    assert slow.given_up(80, 2 * now) == "refused"


def test_a_port_where_nobody_listens_says_nothing_of_another() -> None:
    host = Host()
    for n in range(FAILURES):
        host.no_answer(80, "refused", connected=False, now=10 * n)
        host.answer(443, 8)
    assert host.given_up(80, 10 * FAILURES) == "refused" and host.given_up(443, 10 * FAILURES) is None


def test_a_host_that_answered_long_ago_is_given_up_too() -> None:
    host = Host()
    host.answer(80, 8)
    host.begin()
    for n in range(FAILURES):
        host.no_answer(80, "timeout", connected=True, now=10 * n)
    assert host.given_up(80, 10 * FAILURES) == "timeout"


def test_a_host_that_was_given_up_gets_chances_further_and_further_apart() -> None:
    host, now = Host(), 0.0
    for _ in range(FAILURES - 1):
        host.no_answer(80, "timeout", connected=True, now=now)
        now = host.not_before + 1
    for pause in (60, 120, 240, 480, 600, 600):
        assert host.given_up(80, now) is None and host.at_once == 1
        host.no_answer(80, "timeout", connected=True, now=now)
        assert host.given_up(80, now + pause - 1) == "timeout"
        now += pause + 1
    host.answer(80, 8)
    host.no_answer(80, "refused", connected=False, now=now)
    assert host.given_up(80, now) is None


def test_hosts_that_ask_nothing_are_forgotten_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MANY", 3)
    hosts = Hosts()
    for name in "abcd":
        hosts.begin(name).answer(80, 8)
    hosts["a"].overloaded(80, "http-429", 30.0, 60, now=0)
    kept, other = hosts["a"], hosts["b"]
    hosts.forget(now=1)
    assert hosts.begin("a") is kept and hosts.begin("b") is not other
    for name in "efghbij":
        hosts.begin(name).no_answer(80, "refused", connected=False, now=2)
    hosts.forget(now=100)
    assert [name in hosts._hosts for name in "aefghbij"] == [False] * 5 + [True] * 3  # the last


@dataclass(eq=False)
class _Request:
    host: str
    port: int = 80


async def _room() -> None: ...


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_a_host_that_waits_holds_up_nobody_else() -> None:
    async def work() -> None:
        hosts = Hosts()
        hosts.begin("slow").not_before = asyncio.get_running_loop().time() + 3600
        queue: Queue[_Request] = Queue(hosts, per_host=8, interval=0, room=_room)
        for n in range(50):
            queue.put(_Request("slow"))
            queue.put(_Request(f"host-{n % 5}"))
        for _ in range(50):
            request, _ = await queue.take()
            assert request.host != "slow"
            hosts[request.host].answer(80, 8)
            queue.done(request)
        taker = asyncio.ensure_future(queue.take())
        await asyncio.sleep(0.05)
        assert not taker.done()
        taker.cancel()

    _run(work())


def test_no_host_has_more_requests_than_its_share_and_all_are_served() -> None:
    async def work() -> None:
        hosts, under_way, most, served = Hosts(), Counter[str](), Counter[str](), Counter[str]()
        queue: Queue[_Request] = Queue(hosts, per_host=3, interval=0, room=_room)

        async def serve() -> None:
            while True:
                request, _ = await queue.take()
                name = request.host
                under_way[name] += 1
                most[name] = max(most[name], under_way[name])
                served[name] += 1
                await asyncio.sleep(0.001)
                under_way[name] -= 1
                hosts[name].answer(80, 3)
                queue.done(request)

        for n in range(160):
            queue.put(_Request("abcd"[n % 4]))
        tasks = [asyncio.create_task(serve()) for _ in range(16)]
        while served.total() < 160:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)
        assert most == dict.fromkeys("abcd", 3)

    _run(work())


def test_connections_are_closed_with_the_last_requests_of_a_host() -> None:
    async def work() -> None:
        hosts = Hosts()
        queue: Queue[_Request] = Queue(hosts, per_host=2, interval=0, room=_room)
        hosts.begin("a").answer(80, 2)
        for _ in range(6):
            queue.put(_Request("a"))
        lasts = []
        for _ in range(3):
            first, second = await queue.take(), await queue.take()
            lasts += [first[1], second[1]]
            queue.done(first[0])
            queue.done(second[0])
        assert lasts == [False] * 4 + [True] * 2

    _run(work())


def test_requests_to_a_host_keep_their_distance() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        hosts = Hosts()
        queue: Queue[_Request] = Queue(hosts, per_host=8, interval=0.05, room=_room)
        for _ in range(6):
            queue.put(_Request("a"))
        start = loop.time()
        for _ in range(6):
            request, _ = await queue.take()
            hosts["a"].answer(80, 8)
            queue.done(request)
        assert loop.time() - start >= 5 * 0.05 - 0.01

    _run(work())


def test_bytes_that_nobody_takes_hold_up_requests_and_one_answer_goes_on() -> None:
    async def work() -> None:
        budget = Budget(100)
        await budget.room()
        budget.add(150)
        waiting = asyncio.ensure_future(budget.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        budget.add(60)
        assert not budget.must_wait("first") and budget.must_wait("second")
        async with asyncio.timeout(3600) as clock:
            second = asyncio.ensure_future(budget.wait("second", clock))
            await asyncio.sleep(0)
            assert not second.done() and clock.when() is None
            budget.end("first")
            await second
            assert clock.when() is not None
        budget.end("second")
        await asyncio.to_thread(budget.give, 15)
        await asyncio.to_thread(budget.give, 100)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await asyncio.to_thread(budget.give, 50)
        await waiting

    _run(work())
