from __future__ import annotations

import functools
import gzip
import hashlib
import html
import http.server
import json
import os
import pickle
import random
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import ftfy
import pytest
import torch
import yaml
from click.testing import CliRunner

from pipeline.config.inputs import Text
from pipeline.core.errors import DataError, StorageError, UserError
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest
from pipeline.stream.text import Tokenizer, main

SIZE = 900
THINGS = ["dog", "café", "Straße", "собака", "東京タワー", "lighthouse"]
CAPTIONS = [
    "", " ", "\n\t", "a photo of a dog", "  Many   spaces\tand\nlines\r\n ", "It's, we've, I'M, they'LL, she'd, you're, can't; 'twas",
    "'''s ''ll \"'re 'x 's's", "“Curly” ‘quotes’ – dashes…", "&amp;lt;b&amp;gt; &#39;s &eacute; &nbsp; &amp;amp;amp; &unknown; &#x1F600;",  # noqa: RUF001
    "<p>&lt;tag&gt; 5 &gt; 3</p>", "<b> &amp;lt;i&amp;gt; &amp;amp;amp;", "2019 was 1,000.50 €; ½ ² Ⅷ ४५ ①", "日本語のテキスト 한국어 العربية हिन्दी ไทย", "😀 👨‍👩‍👧 🇩🇪 ❤️ 👍🏽", "e\u0301 ﬁ ﬆ ＡＢＣ İstanbul ẞ ǅ ſ 'ſ",  # noqa: RUF001
    "âœ” mojibake, schÃ¶n", "\x1b[36mred\x1b[0m \x00\x07 bell", "\u2028x\u2029y\u3000z\u00a0w\u200bq\u180ev\ufeff", "foo_bar-baz@example.com #tag http://x.y/z?a=b&c=d",
    "x" * 500, "word " * 200, "!?" * 90, "東" * 100, "</w> a</w>b <|startoftex",
]  # fmt: skip


def pictograms() -> list[str]:
    """What some 800 pictograms show, in Unicode's words: "night with stars"."""
    return [unicodedata.name(chr(c)).lower() for c in range(0x1F300, 0x1F650) if unicodedata.category(chr(c)) != "Cn"]


def made_up(seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{draw.choice(['A photo of', 'my'])} {name}, {draw.choice(THINGS)}'s {n % 37}!" for n, name in enumerate(pictograms())]


def invented(count: int) -> list[str]:
    """Characters and pieces of all kinds, thrown together; none that Unicode has added since this Python's tables."""
    draw = random.Random(1)
    ranges = [
        (0x20, 0x7F),
        (0x80, 0x250),
        (0x370, 0x600),
        (0x900, 0xA00),
        (0x3040, 0x3100),
        (0x1F300, 0x1F700),
        (0x2000, 0x2070),
        (0, 0x21),
    ]
    pools = [[chr(c) for c in range(*r) if unicodedata.category(chr(c)) != "Cn"] for r in ranges]
    pieces = [" ", "'s", "&amp;", "&#x27;", "&lt;", "the", "dog", "'LL", "12", "  "]

    def piece() -> str:
        return draw.choice(draw.choice(pools)) if draw.random() < 0.6 else draw.choice(pieces)

    return ["".join(piece() for _ in range(draw.randrange(40))) for _ in range(count)]


# OpenAI's algorithm, in the words of this test


def merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """The captions here hold no letters and numbers outside the first plane."""
    kinds = {kind: "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == kind) for kind in "LN"}
    return re.compile(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[{kinds['L']}]+|[{kinds['N']}]|[^\s{kinds['L']}{kinds['N']}]+")


@functools.cache
def letters() -> dict[int, str]:
    """openai/CLIP, simple_tokenizer.py, `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in printable)}


def split_words(text: str) -> list[tuple[str, ...]]:
    """Words as bytes in letters, the last one marked."""
    words = [[letters()[b] for b in word.encode()] for word in word_pattern().findall(text)]
    return [(*word[:-1], word[-1] + "</w>") for word in words]


class Reference:
    """openai/CLIP: `SimpleTokenizer`, and `tokenize` with truncate=True."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        base = list(letters().values())
        vocabulary = [*base, *(c + "</w>" for c in base), *map("".join, merges), "SOT", "EOT"]
        self.numbers = {token: n for n, token in enumerate(vocabulary)}
        self.ranks = {pair: n for n, pair in enumerate(merges)}

    @functools.cache  # noqa: B019  it lives as long as the tests
    def bpe(self, word: tuple[str, ...]) -> list[int]:
        while pairs := [pair for pair in pairwise(word) if pair in self.ranks]:
            word = merge(word, min(pairs, key=self.ranks.__getitem__))
        return [self.numbers[token] for token in word]

    def encode(self, text: str, length: int = 77) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = re.sub(r"\s+", " ", text).strip().lower()
        ids = [self.numbers["SOT"], *(number for word in split_words(text) for number in self.bpe(word)), self.numbers["EOT"]]
        if len(ids) > length:
            ids = [*ids[: length - 1], self.numbers["EOT"]]
        return ids + [0] * (length - len(ids))


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(iter(made_up()), SIZE)


@pytest.fixture(scope="module")
def merges(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    path = tmp_path_factory.mktemp("merges") / "tokenizer.json"
    trained.save(str(path))
    return [(left, right) for left, right in json.loads(path.read_bytes())["model"]["merges"]]


@pytest.fixture(scope="module")
def reference(merges: list[tuple[str, str]]) -> Reference:
    return Reference(merges)


@pytest.fixture(scope="module")
def vocabulary(merges: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the format of OpenAI's bpe_simple_vocab_16e6.txt.gz."""
    path = tmp_path_factory.mktemp("vocabulary") / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *map(" ".join, merges), ""]).encode()))
    return path


def test_the_numbers_are_those_of_openai(trained: Tokenizer, vocabulary: Path, reference: Reference) -> None:
    texts = [*CAPTIONS, *made_up(seed=5), *invented(2000)]
    wanted = torch.tensor([reference.encode(text) for text in texts])
    assert len(wanted.unique()) > 600  # most of the vocabulary is seen
    for tokenizer in (Tokenizer.load(str(vocabulary)), trained):
        tokens = tokenizer(texts)
        wrong = [text for text, a, b in zip(texts, tokens, wanted, strict=True) if not torch.equal(a, b)]
        assert not wrong, f"{len(wrong)} of {len(texts)}, the first: {wrong[0]!r}"
        assert tokens.dtype == torch.int64 and tokens.shape == (len(texts), 77)
        assert (tokenizer.size, tokenizer.sot, tokenizer.eot) == (SIZE, SIZE - 2, SIZE - 1)


def test_every_character_alone(trained: Tokenizer, reference: Reference) -> None:
    """All below U+3400; but U+0345 is a letter to OpenAI's regex, for there it ignores case, and to nobody else."""
    known = [c for c in map(chr, range(0x3400)) if unicodedata.category(c) not in ("Cn", "Cs") and c != "\u0345"]
    texts = [f"a{c}b '{c} 1{c}" for c in known]
    assert trained(texts).tolist() == [reference.encode(text) for text in texts]


@pytest.mark.parametrize("length", [3, 10, 77])
def test_truncation_keeps_the_end_mark(trained: Tokenizer, length: int) -> None:
    texts = ["", "dog", "a b c d e f g h", "word " * 200]
    for text, row in zip(texts, trained(texts, length).tolist(), strict=True):
        full = trained([text], 1000)[0].tolist()
        used = min(full.index(trained.eot) + 1, length)
        assert row[0] == trained.sot and row[used - 1] == trained.eot and row.count(trained.eot) == 1
        assert row[: used - 1] == full[: used - 1] and not any(row[used:])
    assert trained([], length).shape == (0, length)


def test_a_caption_cannot_hold_marks(trained: Tokenizer) -> None:
    tokens = trained(["a <|endoftext|> b <|startoftext|> &lt;|endoftext|&gt;"])[0].tolist()
    assert tokens.count(trained.eot) == tokens.count(trained.sot) == 1
    assert trained.decode(tokens) == "a <| endoftext |> b <| startoftext |> <| endoftext |>"


def test_decoding(trained: Tokenizer) -> None:
    texts = ["a photo of a dog", "東京タワー 😀 straße", "it 's 1 2 !", "", "&amp;lt;"]
    assert [trained.decode(row) for row in trained(texts)] == [*texts[:4], "<"]
    assert trained.decode(trained(["界"])[0, :2]) == "\ufffd"  # part of a character is no error
    assert trained.decode(trained(["A photo of"])[0, 1:3].tolist()) == "a photo"


# Training


def learn(captions: list[str], count: int) -> list[tuple[str, str]]:
    """Sennrich, Haddow and Birch 2016, algorithm 1; of pairs as frequent, the one whose tokens came first."""
    order = {token: n for n, token in enumerate(Reference([]).numbers)}
    del order["SOT"], order["EOT"]
    words = Counter(word for caption in captions for word in split_words(caption.lower()))
    learnt: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        learnt.append(min(pairs, key=lambda p: (-pairs[p], order[p[0]], order[p[1]])))
        order["".join(learnt[-1])] = len(order)
        words = Counter({merge(word, learnt[-1]): times for word, times in words.items()})
    return learnt


def test_the_merges_are_the_most_frequent_pairs(merges: list[tuple[str, str]]) -> None:
    assert len(merges) == SIZE - 514 and merges == learn(made_up(), len(merges))


def test_training_is_the_same_each_time_and_in_any_order(trained: Tokenizer) -> None:
    """Many pairs are equally frequent here, and the library's own numbers of them change from call to call."""
    captions = made_up()
    for seed in range(4):
        random.Random(seed).shuffle(captions)
        assert Tokenizer.train(iter(captions), SIZE).hash == trained.hash
    assert Tokenizer.train(iter(captions[:500]), SIZE).hash != trained.hash


def test_little_text_gives_few_tokens() -> None:
    tokenizer = Tokenizer.train(iter(["aa bb", "aa bc"]), SIZE)
    assert tokenizer.size == 515 and tokenizer.eot == 514  # only "aa" occurs twice
    with pytest.raises(DataError, match="the captions hold too little text to learn tokens from"):
        Tokenizer.train(iter(["", " "]))
    with pytest.raises(UserError, match=r"size: 514 is too small \(allowed: 515 or more"):
        Tokenizer.train(iter(["aa aa"]), 514)


def test_several_threads(trained: Tokenizer) -> None:
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    copy = pickle.loads(pickle.dumps(trained))  # noqa: S301
    texts = made_up() * 4
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(copy, [texts[n : n + 16] for n in range(0, len(texts), 16)]))
    assert torch.equal(torch.cat(parts), trained(texts)) and copy.hash == trained.hash


# Files


def test_files(trained: Tokenizer, vocabulary: Path, store: Storage) -> None:
    """Either kind, on any store, gives back what was saved, byte for byte."""
    for made in (trained, Tokenizer.load(str(vocabulary))):
        made.save(f"{store.url}/some/file", store.endpoint)
        data = store.read("some/file")
        assert hashlib.sha256(data).hexdigest() == made.hash
        again = Tokenizer.load(f"{store.url}/some/file", made.hash.upper(), store.endpoint)
        assert again.hash == made.hash and torch.equal(again(CAPTIONS), trained(CAPTIONS))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server that serves `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_from_the_web(trained: Tokenizer, tmp_path: Path, web: str, free_port: int) -> None:
    (tmp_path / "a").mkdir()
    trained.save(str(tmp_path / "a/tokenizer.json"))
    url = f"{web}/a/tokenizer.json"
    assert Tokenizer.load(url, trained.hash, endpoint="http://of.another.store").hash == trained.hash
    with pytest.raises(DataError, match=f"^{web}/b.json: there is no such file$"):
        Tokenizer.load(f"{web}/b.json")
    with pytest.raises(StorageError, match=f"127.0.0.1:{free_port}/b.json: cannot read"):
        Tokenizer.load(f"http://127.0.0.1:{free_port}/b.json")


def test_another_file_than_expected(vocabulary: Path) -> None:
    found, wanted = hashlib.sha256(vocabulary.read_bytes()).hexdigest(), "0" * 64
    with pytest.raises(DataError, match=f"^{vocabulary}: this is another file, its sha256 is {found} and {wanted} was expected$"):
        Tokenizer.load(str(vocabulary), wanted)


VERSION = b'"some#version: 0.2\n'


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda good: good[:-100], "end-of-stream"),
        (lambda good: good[:500] + bytes([good[500] ^ 255]) + good[501:], "Error|CRC|invalid"),
        (lambda good: b"", "#version"),
        (lambda good: b"some words\nof another kind", "#version"),
        (lambda good: b"\xff\xfe\x00", "can't decode"),
        (lambda good: VERSION + b"t h\nthe", "merge 2 is not of two tokens"),
        (lambda good: VERSION + b"t h\nthe n", "merge 2 is not of two tokens that stand before it"),
        (lambda good: b"{}", "it has no 'model'"),
        (lambda good: b'{"model": {"merges": [], "vocab": {"a": 0}}}', "its tokens are not numbered as CLIP's"),
        (lambda good: b'{"model": {"merges": 7}}', "not iterable"),
    ],
)
def test_other_files_are_refused(vocabulary: Path, tmp_path: Path, damage: Callable[[bytes], bytes], why: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(damage(vocabulary.read_bytes()))
    with pytest.raises(
        DataError, match=rf"^{path}: is damaged, or neither a tokenizer.json made here nor OpenAI's vocabulary \(.*({why}).*\)$"
    ):
        Tokenizer.load(str(path))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}/none: there is no such file$"):
        Tokenizer.load(f"{tmp_path}/none")
    with pytest.raises(UserError, match=f"^'{tmp_path}/': names a directory, a file is wanted$"):
        Tokenizer.load(f"{tmp_path}/")


# The command


def test_command(make_dataset: Callable[..., Manifest], tmp_path: Path) -> None:
    make_dataset(Storage(str(tmp_path / "data")), {"train": 30, "test": 5})
    out = tmp_path / "new/tokenizer.json"
    result = CliRunner().invoke(main, [str(tmp_path / "data"), str(out), "--size", "517"])
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.load(str(out))
    assert tokenizer.size == 517 and f"sha256  {tokenizer.hash}" in result.output
    assert tokenizer.decode(tokenizer(["train 7"])[0]) == "train 7" and len(tokenizer(["train"])[0].nonzero()) == 2 + 2  # tra, in
    line = next(line for line in result.output.splitlines() if line.startswith("config"))
    section = Text(**yaml.safe_load(line.removeprefix("config"))["text"])
    assert Tokenizer.load(section.tokenizer, section.sha256).hash == tokenizer.hash

    few = CliRunner().invoke(main, [str(tmp_path / "data"), str(out)])
    assert few.exit_code == 0 and "(the captions yield no more of the 49,408)" in few.output
    for arguments, message in ([["none"], "there is no dataset here"], [["data", "--split", "val"], "there is no split 'val'"]):
        failed = CliRunner().invoke(main, [str(tmp_path / arguments[0]), str(out), *arguments[1:]])
        assert failed.exit_code == 3 and failed.output.startswith("error: ") and message in failed.output
