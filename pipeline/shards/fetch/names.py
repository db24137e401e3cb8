"""Host names to addresses.

The system's own resolver (getaddrinfo: it knows /etc/hosts and whatever else the machine is set up for) in threads of its own, with a
cache in front. aiohttp's cache keeps successes alone; here a name that does not exist is asked for once too, and URLs of the same host wait
for one query together: a collection names each host many times, and one in ten of its names may be gone.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.shards.fetch.addresses import Forbidden, Guard
from pipeline.shards.fetch.answers import Failed

_THREADS = 64  # queries under way: most of a query is waiting
_KEPT = 600.0  # seconds
_MOST = 100_000  # names in the cache, some 55 MB
_LONGEST = 20.0  # seconds for a query; the thread that waits for a dead name server is busy for longer
_PAUSES = (0.5, 1.0)  # seconds, before a name server that is in trouble is asked again
_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class Address(NamedTuple):
    text: str
    family: socket.AddressFamily
    protocol: int


Found = list[Address] | OSError


class _Kept(NamedTuple):
    found: Found
    until: float


class Names(AbstractResolver):
    """A resolver for aiohttp's connector: gives only addresses that `guard` permits."""

    def __init__(self, guard: Guard) -> None:
        self._loop = asyncio.get_running_loop()
        self._guard = guard
        self._threads = ThreadPoolExecutor(_THREADS, "resolver")
        self._kept: dict[str, _Kept] = {}  # the oldest first
        self._asked: dict[str, asyncio.Task[Found]] = {}

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

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
        return [ResolveResult(hostname=host, host=a.text, port=port, family=a.family, proto=a.protocol, flags=_NUMERIC) for a in found]

    def forget_failures(self) -> None:
        """Names that were not found, or lead nowhere; the next who wants them asks again."""
        self._kept = {host: kept for host, kept in self._kept.items() if not isinstance(kept.found, OSError)}

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
        self._kept.pop(host, None)
        if len(self._kept) >= _MOST:
            self._kept.pop(next(iter(self._kept)))
        self._kept[host] = _Kept(found, self._loop.time() + _KEPT)
        return found

    async def _query(self, host: str) -> Found:
        for pause in (*_PAUSES, None):
            try:
                every = await self._addresses(host)
            except TimeoutError:
                return OSError(f"{host}: name servers do not answer")
            except socket.gaierror as e:
                if e.errno != socket.EAI_AGAIN or pause is None:
                    return e
                await asyncio.sleep(pause)
            except (OSError, UnicodeError) as e:
                return OSError(f"{host}: {e}")
            else:
                permitted = [one for one in every if self._guard.permits(host, one.text)]
                return permitted or Forbidden(f"{host}: no address of it may be asked")
        raise AssertionError("the last attempt returns")

    async def _addresses(self, host: str) -> list[Address]:
        """The clock runs from when a thread is free: where all wait for dead name servers, other names are late, and not lost."""
        began = asyncio.Event()
        answer = self._loop.run_in_executor(self._threads, self._system, host, began)
        await began.wait()
        return await asyncio.wait_for(answer, _LONGEST)

    def _system(self, host: str, began: asyncio.Event) -> list[Address]:
        self._loop.call_soon_threadsafe(began.set)
        found = []
        for family, _, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG):
            scope = f"%{address[3]}" if len(address) == 4 and address[3] else ""  # of a link-local address
            found.append(Address(f"{address[0]}{scope}", family, protocol))
        return found
