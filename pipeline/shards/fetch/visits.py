"""From one request to the next: redirects, other attempts, robots.txt.

A URL becomes a `Visit`, which the queue hands to one of `connections` tasks for one request at a time. What comes of that is the result, or
the visit goes back into the queue: to where it is redirected, or to the same place for another attempt. A visit to an origin whose
robots.txt is not known waits for that outside the queue; robots.txt itself is a visit like others, with the same guard and manners.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from yarl import URL

from pipeline.config.shard import Fetch
from pipeline.shards.fetch import robots
from pipeline.shards.fetch.answers import Failed, Fetched, dropped, http_reason
from pipeline.shards.fetch.budget import Budget
from pipeline.shards.fetch.client import Answer, Client
from pipeline.shards.fetch.hosts import Hosts, backoff
from pipeline.shards.fetch.queue import Queue
from pipeline.shards.fetch.spelling import parse_url
from pipeline.shards.images import Dropped

Deliver = Callable[[int, Fetched | Dropped], None]
_OVERLOADED = frozenset({429, 503})
_ANSWERED = frozenset({"truncated", "too-long", "bad-encoding"})  # though not as we wish
# What keeps robots.txt from being read, and would keep the image from it just as well: the more telling reason.
_SAME_FOR_IMAGES = frozenset({"forbidden-address", "dns", "refused", "unreachable", "tls", "reset", "timeout", "bad-http"})


@dataclass(eq=False, slots=True)
class Visit:
    """`index` into the caller's URLs; of a robots.txt instead the `origin` it is for."""

    index: int
    url: URL
    origin: str | None = None
    attempts: int = 0
    left: list[URL] = field(default_factory=list)  # URLs that redirected it

    @property
    def host(self) -> str:
        return self.url.raw_host or ""

    @property
    def port(self) -> int:
        return self.url.port or 0


@dataclass(frozen=True)
class Known:
    """What outlives a run: connections, names, manners and rules of hosts."""

    client: Client
    budget: Budget
    hosts: Hosts
    rules: robots.RulesCache

    def forget_failures(self, answered: bool) -> None:
        """What was not found gets another chance with the next list, names and robots.txt; that hosts do not answer is remembered, unless
        none of this list's `answered`, since then it may have been the network."""
        self.client.forget_failures()
        self.rules.forget_failures()
        if not answered:
            self.hosts.forget_silence()


class Run:
    """All visits of one list of URLs; each is delivered once."""

    def __init__(self, config: Fetch, longest: int, share: int, deliver: Deliver) -> None:
        self._config, self._longest, self._deliver = config, longest, deliver
        self._interval = share / config.rate if config.rate else 0.0
        self._per_host = max(1, config.per_host // share)
        self._patience = config.patience.seconds
        self._token = robots.product_token(config.agent)
        self._parked: dict[str, list[Visit]] = {}  # by the origin whose robots.txt they wait for
        self._ended = asyncio.Event()
        self._answered = False  # any host

    def stop(self) -> None:
        self._ended.set()

    async def work(self, known: Known, urls: Sequence[str]) -> None:
        """Until everything is delivered, or `stop`."""
        self._loop = asyncio.get_running_loop()
        self._known, self._left = known, len(urls)
        known.hosts.forget(self._loop.time())
        self._queue: Queue[Visit] = Queue(known.hosts, self._per_host, self._interval, known.budget.room)
        if not urls:
            return
        try:
            await self._visit(urls)
        finally:
            self._queue.close()
            known.forget_failures(self._answered)

    async def _visit(self, urls: Sequence[str]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._requests()) for _ in range(self._config.connections)]
            for index, text in enumerate(urls):
                if self._ended.is_set():
                    break
                url = parse_url(text)
                self._end(index, dropped("bad-url")) if url is None else self._admit(Visit(index, url))
                if index % 100 == 0:
                    await asyncio.sleep(0)
            await self._ended.wait()
            for task in tasks:
                task.cancel()

    async def _requests(self) -> None:
        while True:
            visit, last = await self._queue.take()
            try:
                await self._request(visit, last)
            finally:
                self._queue.done(visit)

    def _admit(self, visit: Visit) -> None:
        """Into the queue, where its host allows it."""
        if visit.origin is None and self._config.robots:
            origin = str(visit.url.origin())
            rules = self._known.rules.get(origin, self._loop.time())
            if rules is None:
                self._park(visit, origin)
                return
            if (reason := rules.refusal(str(visit.url), self._token)) is not None:
                self._end(visit.index, dropped(reason))
                return
        self._queue.put(visit)

    def _park(self, visit: Visit, origin: str) -> None:
        parked = self._parked.get(origin)
        if parked is not None:
            parked.append(visit)
            return
        self._parked[origin] = [visit]
        self._queue.put(Visit(-1, URL(f"{origin}/robots.txt"), origin), first=True)

    async def _request(self, visit: Visit, last: bool) -> None:
        host = self._known.hosts[visit.host]
        if (reason := host.given_up(visit.port, self._loop.time())) is not None:
            self._fail(visit, Failed(reason))
            return
        is_rules = visit.origin is not None
        longest = robots.LONGEST if is_rules else self._longest
        visit.attempts += 1
        try:
            answer = await self._known.client.get(visit.url, longest, last=last and not is_rules, cut=is_rules)
        except Failed as failed:
            if failed.reason in _ANSWERED:
                self._answered = True
                host.answer(visit.port, self._per_host)
            elif failed.again:
                host.no_answer(visit.port, failed.reason, failed.connected, self._loop.time())
            self._fail(visit, failed)
            return
        self._answered = True
        if answer.status in _OVERLOADED:
            host.overloaded(visit.port, http_reason(answer.status), answer.retry_after, self._patience, self._loop.time())
        else:
            host.answer(visit.port, self._per_host)
        self._judge(visit, answer)

    def _judge(self, visit: Visit, answer: Answer) -> None:
        if answer.opted_out and visit.origin is None:
            self._finish(visit, dropped("opted-out"))
        elif answer.location is not None:
            self._redirect(visit, answer.location)
        elif answer.status not in (200, 203):
            again = answer.status == 429 or answer.status >= 500
            if answer.retry_after is not None and answer.retry_after > self._patience:
                again = False
            self._fail(visit, Failed(http_reason(answer.status), again))
        elif not answer.data and visit.origin is None:
            self._finish(visit, dropped("empty-body"))
        else:
            self._finish(visit, Fetched(answer.data, str(visit.url), answer.content_type))

    def _redirect(self, visit: Visit, location: str) -> None:
        target = parse_url(location, visit.url)
        visit.left.append(visit.url)
        most = self._config.redirects if visit.origin is None else robots.REDIRECTS
        if target is None:
            self._finish(visit, dropped("bad-url"))
        elif target in visit.left:
            self._finish(visit, dropped("redirect-loop"))
        elif len(visit.left) > most:
            self._finish(visit, dropped("too-many-redirects"))
        else:
            self._admit(Visit(visit.index, target, visit.origin, visit.attempts - 1, visit.left))

    def _fail(self, visit: Visit, failed: Failed) -> None:
        if not failed.again or visit.attempts > self._config.retries:
            self._finish(visit, dropped(failed.reason))
        elif failed.reason in ("http-429", "http-503"):  # its host says when
            self._queue.put(visit)
        else:
            self._queue.put_later(visit, backoff(visit.attempts, self._patience))

    def _finish(self, visit: Visit, result: Fetched | Dropped) -> None:
        if visit.origin is None:
            self._end(visit.index, result)
            return
        self._known.rules.put(visit.origin, self._rules(visit, result), self._loop.time())
        for waiting in self._parked.pop(visit.origin):
            self._admit(waiting)

    def _rules(self, visit: Visit, result: Fetched | Dropped) -> robots.Rules:
        """What a visit to robots.txt says of its origin (RFC 9309, 2.3.1)."""
        if isinstance(result, Fetched):
            return robots.parse_rules(result.data, self._token)
        reason = result.reason
        if reason in _SAME_FOR_IMAGES and not visit.left:
            return robots.Rules(reason=reason)
        unavailable = (reason.startswith("http-") and reason[5] != "5" and reason != "http-429") or "redirect" in reason
        return robots.Rules() if unavailable else robots.Rules(reason="robots")

    def _end(self, index: int, result: Fetched | Dropped) -> None:
        self._deliver(index, result)
        self._left -= 1
        if self._left == 0:
            self._ended.set()
