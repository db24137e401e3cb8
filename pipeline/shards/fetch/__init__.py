"""Images from the web: asynchronous, polite to hosts, and safe against what URLs of strangers point at.

addresses.py   which addresses may be asked: the guard at the resolver and at the socket
names.py       host names to addresses, cached
robots.py      robots.txt and X-Robots-Tag: what a host asks of robots
hosts.py       whose turn it is: per-host concurrency, rate, pauses, when a host is given up
budget.py      bytes that wait for whoever asked for them: the back-pressure
client.py      one request: the only file that speaks HTTP (aiohttp)
answers.py     what comes of a URL, and why nothing comes
fetcher.py     URLs in, images or reasons out
"""

from pipeline.shards.fetch.answers import Fetched
from pipeline.shards.fetch.fetcher import Fetcher, rules_of

__all__ = ["Fetched", "Fetcher", "rules_of"]
