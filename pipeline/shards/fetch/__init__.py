"""Images from the web: asynchronous, polite to hosts, and safe against what URLs of strangers point at.

addresses.py   which addresses may be asked: the guard at the resolver and at the socket
names.py       host names to addresses, cached
spelling.py    what people write, as a URL that can be asked for
robots.py      robots.txt and X-Robots-Tag: what a host asks of robots
hosts.py       what is known of hosts: how they may be asked, until when they are left alone or given up
queue.py       whose turn it is: per-host concurrency, rate, pauses
budget.py      bytes that wait for whoever asked for them: the back-pressure
client.py      one request: the only file that speaks HTTP (aiohttp)
answers.py     what comes of a URL, and why nothing comes
visits.py      from one request to the next: redirects, other attempts, robots.txt
fetcher.py     URLs in, images or reasons out; what a process knows of hosts lasts as long as it
"""

from pipeline.shards.fetch.answers import Fetched
from pipeline.shards.fetch.fetcher import Fetcher, fetcher_of

__all__ = ["Fetched", "Fetcher", "fetcher_of"]
