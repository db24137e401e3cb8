"""One request over HTTP, guarded and bounded. The only file that speaks it.

aiohttp keeps connections open and parses; what is decided about them is ours: no cookies, no credentials (those in a URL are not sent, and
no netrc is read), no proxies from the environment (a proxy would resolve names where no guard stands), no redirects of its own, and no
decompression of its own, since a few kilobytes can stand for gigabytes.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address

import aiohttp
from aiohttp.connector import Connection
from yarl import URL

from pipeline.shards.fetch.addresses import Forbidden, Guard, asked_host
from pipeline.shards.fetch.answers import Failed
from pipeline.shards.fetch.budget import Budget
from pipeline.shards.fetch.hosts import retry_after
from pipeline.shards.fetch.names import Names
from pipeline.shards.fetch.robots import opts_out, product_token

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BODIES = frozenset({200, 203})
_IDLE = 5.0  # seconds that a connection without a request is kept
_BUFFER = 1 << 17  # bytes of one connection
_INFLATED = 1 << 20  # bytes that are decompressed at a time
_REST, _REST_TIME = 1 << 16, 1.0  # bytes and seconds of an answer nobody wants that are read to keep its connection
_CLOSE = {"Connection": "close"}
_ERRNO = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timeout",
}


@dataclass(frozen=True)
class Answer:
    """`data` is of a whole answer (status 200 or 203), `location` where a redirect leads, `retry_after` in seconds."""

    status: int
    data: bytes = b""
    content_type: str = ""
    location: str | None = None
    retry_after: float | None = None
    opted_out: bool = False


class _Response(aiohttp.ClientResponse):
    """Of a connection that is closed after it, where we said so, whatever the host does: those of thousands of hosts would stay open."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        if self.request_info.headers.get("Connection") == "close" and connection.protocol is not None:
            connection.protocol.force_close()
        return await super().start(connection)


class Client:
    """For one event loop; `timeout` in seconds, of one request."""

    def __init__(self, guard: Guard, budget: Budget, agent: str, opt_out: Collection[str], timeout: float) -> None:
        self._budget, self._timeout = budget, timeout
        self._token, self._opt_out = product_token(agent), frozenset(word.lower() for word in opt_out)
        self._names = Names(guard)
        connector = aiohttp.TCPConnector(
            resolver=self._names, use_dns_cache=False, socket_factory=guard.open_socket, limit=0, keepalive_timeout=_IDLE
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": agent, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout / 2),
            response_class=_Response,
            trust_env=False,
            auto_decompress=False,
            read_bufsize=_BUFFER,
        )

    async def close(self) -> None:
        await self._session.close()
        await self._names.close()

    def forget_failures(self) -> None:
        """Names that were not found are asked for again."""
        self._names.forget_failures()

    async def get(self, url: URL, longest: int, last: bool = False, cut: bool = False) -> Answer:
        """Ask for `url`. An image of more than `longest` bytes, decompressed, is too long; of another file (`cut`) the beginning is taken,
        and opt-outs do not matter. `last`: the connection will not be needed again.

        Raises:
            Failed: there is no answer, or no whole one.
        """
        host = url.raw_host or ""
        try:
            if not _is_address(host):
                await self._names.look_up(host)
            asked_host.set(host)
            async with (
                asyncio.timeout(self._timeout) as clock,
                self._session.get(url, headers=_CLOSE if last else None, allow_redirects=False) as response,
            ):
                return await self._receive(response, longest, cut, clock)
        except aiohttp.ConnectionTimeoutError as e:
            raise Failed("timeout", again=True, connected=False) from e
        except TimeoutError as e:
            raise Failed("timeout", again=True) from e
        except (aiohttp.ClientError, OSError) as e:
            raise _failure(e) from e

    async def _receive(self, response: aiohttp.ClientResponse, longest: int, cut: bool, clock: asyncio.Timeout) -> Answer:
        status, headers = response.status, response.headers
        if self._opt_out and not cut and status < 400 and opts_out(headers.getall("X-Robots-Tag", ()), self._token, self._opt_out):
            await _use_up(response)
            return Answer(status, opted_out=True)
        if status not in _BODIES:
            await _use_up(response)
            location = headers.get("Location") if status in _REDIRECTS else None
            return Answer(status, location=location, retry_after=retry_after(headers.get("Retry-After")))
        if not cut and (response.content_length or 0) > longest:
            raise Failed("too-long")
        try:
            return Answer(status, await self._read(response, longest, cut, clock), headers.get("Content-Type", ""))
        except (aiohttp.ClientError, ConnectionError) as e:
            raise Failed("truncated", again=True) from e
        except zlib.error as e:
            raise Failed("bad-encoding") from e

    async def _read(self, response: aiohttp.ClientResponse, longest: int, cut: bool, clock: asyncio.Timeout) -> bytes:
        """The body; the budget counts it meanwhile."""
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        inflate = _Inflate(longest) if encoding in ("gzip", "x-gzip", "deflate") else None
        parts, size, content, budget = list[bytes](), 0, response.content, self._budget
        if "Transfer-Encoding" in response.headers:
            _end_with_connection(response)
        try:
            while size <= longest and (chunk := await content.readany()):
                for part in (chunk,) if inflate is None else inflate.pieces(chunk):
                    parts.append(part)
                    size += len(part)
                    budget.add(len(part))
                    if budget.must_wait(response):
                        await budget.wait(response, clock)
                    if size > longest:
                        break
                if inflate is not None and inflate.ended:
                    await _use_up(response)
                    break
            if size > longest and not cut:
                raise Failed("too-long")
            if inflate is not None and inflate.received and size <= longest and not inflate.ended:
                raise Failed("truncated", again=True)
        finally:
            budget.end(response)
            budget.give(size)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _end_with_connection(response: aiohttp.ClientResponse) -> None:
    """A damaged chunk makes aiohttp (3.14) close the connection and forget whoever reads the body; so that has to be told."""
    content = response.content

    def tell(_: object) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was closed"))

    protocol = response.connection and response.connection.protocol
    if protocol is not None and (closed := protocol.closed) is not None:
        closed.add_done_callback(tell)


class _Inflate:
    """Of a body in gzip or zlib; what comes behind its end does not matter."""

    def __init__(self, longest: int) -> None:
        self._stream = zlib.decompressobj(wbits=47)  # gzip or zlib
        self._most = 2 * longest + 1024  # bytes received: some compress to nothing
        self.received = 0

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What `chunk` decompresses to, piece by piece. Raises Failed: it goes on and on."""
        self.received += len(chunk)
        if self.received > self._most:
            raise Failed("too-long")
        while chunk and not self._stream.eof:
            yield self._stream.decompress(chunk, _INFLATED)
            chunk = self._stream.unconsumed_tail


async def _use_up(response: aiohttp.ClientResponse) -> None:
    """Read the rest of an answer that matters no more, if it is short, quick and whole; otherwise its connection ends here."""
    left = _REST
    try:
        async with asyncio.timeout(_REST_TIME):
            while left > 0 and (chunk := await response.content.readany()):
                left -= len(chunk)
    except (TimeoutError, aiohttp.ClientError, OSError):
        response.close()


@lru_cache(4096)
def _is_address(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _failure(error: Exception) -> Failed:
    """What an error before the first byte of the answer means."""
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error
        if isinstance(reason, Forbidden):
            return Failed("forbidden-address")
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return Failed("dns", connected=False)
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(getattr(error, "os_error", error), ssl.SSLError):
        return Failed("tls")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failed(_ERRNO.get(error.os_error.errno or 0, "unreachable"), again=True, connected=False)
    if isinstance(error, aiohttp.InvalidURL):
        return Failed("bad-url")
    if isinstance(error, (aiohttp.ClientConnectionError, ConnectionError)):
        return Failed("reset", again=True)
    if isinstance(error, (aiohttp.ClientResponseError, aiohttp.ClientPayloadError)):
        return Failed("bad-http")
    raise error
