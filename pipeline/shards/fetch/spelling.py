"""What people write, as a URL that can be asked for."""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

_WELL_SPELT = re.compile(r"https?://[a-z0-9._-]+(:[0-9]+)?(?!.*/(\.|%2[Ee]))/([A-Za-z0-9._~:/?@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*")
_STEP = re.compile(r"/(\.|%2e){1,2}(/|$)", re.IGNORECASE)  # to here, or upwards
_ENDS_LINES = str.maketrans("", "", "\t\r\n")
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LETTERS = "%/:@!$&'()*+,;=~?"  # beside letters, digits and -._, what stays as it is


def parse_url(text: str, base: URL | None = None) -> URL | None:
    """An http or https URL without credentials and fragment, relative to `base`; None where it is none.

    What is spelt as it should be keeps its spelling, which may have been signed; all else is escaped, as browsers do. The host is in IDNA,
    and steps (`/../`) are taken, so that robots.txt is asked about what the host will see.
    """
    try:
        text = text.strip().translate(_ENDS_LINES).partition("#")[0]
        text = text if base is None else urljoin(str(base), text)
        url = URL(text, encoded=True) if _WELL_SPELT.fullmatch(text) else _respelt(text)
        return url if url.scheme in ("http", "https") and url.raw_host and url.port != 0 else None
    except ValueError:
        return None


def _respelt(text: str) -> URL:
    """Raises ValueError where there is no host, or what there is in its place is none."""
    written = urlsplit(text)
    if "\\" in written.netloc:  # whose host browsers read otherwise
        raise ValueError(text)
    origin = URL(f"{written.scheme}://{written.netloc.rpartition('@')[2].lower()}").origin()
    path = _escaped(written.path) or "/"
    if _STEP.search(path):
        path = re.sub("%2e", ".", path, flags=re.IGNORECASE)
    return origin.join(URL.build(path=path, query_string=_escaped(written.query), encoded=True))


def _escaped(text: str) -> str:
    """Bytes that were no UTF-8 in a header are lone surrogates here; they are sent as they came."""
    return quote(_LONE_PERCENT.sub("%25", text), safe=_LETTERS, errors="surrogateescape")
