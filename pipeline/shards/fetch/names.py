"""Host names to addresses.

The system's own resolver (getaddrinfo: it knows /etc/hosts and whatever else the machine is set up for) in threads of its own, with a
cache in front. aiohttp's cache keeps successes alone; here a name that does not exist is asked for once too, and URLs of the same host wait
for one query together: a collection names each host many times, and one in ten of its names may be gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast

from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult

from pipeline.shards.fetch.addresses import Forbidden, Guard
from pipeline.shards.fetch.answers import Failed

THREADS = 64  # queries under way: most of a query is waiting
_KEPT = 600.0  # seconds
_MOST = 20_000  # names in the cache
_LONGEST = 20.0  # seconds for a query; the thread that waits for a dead name server is busy for longer
_PAUSES = (0.5, 1.0)  # seconds, before a name server that is in trouble is asked again

Found = list[ResolveResult] | OSError


@dataclass(frozen=True)
class _Kept:
    found: Found
    until: float


class Names(ThreadedResolver):
    """A resolver for aiohttp's connector: gives only addresses that `guard` permits."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard
        self._kept: dict[str, _Kept] = {}
        self._asked: dict[str, asyncio.Task[Found]] = {}

    async def look_up(self, host: str) -> None:
        """Resolve `host` now, so that no request's own time is spent on it. Raises Failed: dns, forbidden-address."""
        found = await self._find(host)
        if isinstance(found, Forbidden):
            raise Failed("forbidden-address")
        if isinstance(found, OSError):
            raise Failed("dns", connected=False)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await self._find(host)
        if isinstance(found, OSError):
            raise found
        return [cast(ResolveResult, {**one, "port": port}) for one in found]

    async def _find(self, host: str) -> Found:
        kept = self._kept.get(host)
        if kept is not None and kept.until > self._loop.time():
            return kept.found
        task = self._asked.get(host)
        if task is None:
            task = self._asked[host] = self._loop.create_task(self._ask(host))
            task.add_done_callback(lambda _: self._asked.pop(host, None))
        return await asyncio.shield(task)

    async def _ask(self, host: str) -> Found:
        found = await self._query(host)
        if len(self._kept) >= _MOST:
            self._kept.pop(next(iter(self._kept)))
        self._kept[host] = _Kept(found, self._loop.time() + _KEPT)
        return found

    async def _query(self, host: str) -> Found:
        for pause in (*_PAUSES, None):
            try:
                every = await asyncio.wait_for(self._addresses(host), _LONGEST)
            except TimeoutError:
                return OSError(f"{host}: name servers do not answer")
            except socket.gaierror as e:
                if e.errno != socket.EAI_AGAIN or pause is None:
                    return e
                await asyncio.sleep(pause)
            except (OSError, UnicodeError) as e:
                return OSError(f"{host}: {e}")
            else:
                permitted = [one for one in every if self._guard.permits(host, one["host"])]
                return permitted or Forbidden(f"{host}: no address of it may be asked")
        raise AssertionError("the last attempt returns")

    def _addresses(self, host: str) -> Awaitable[list[ResolveResult]]:
        return super().resolve(host, 0, socket.AF_UNSPEC)
