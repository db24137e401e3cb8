"""Captions to tokens and back: CLIP's byte-level BPE (Radford et al. 2021, section 2.4; openai/CLIP, simple_tokenizer.py).

`python -m pipeline.stream.text DATASET OUT.json` learns one from a dataset's captions; OpenAI's own vocabulary file,
bpe_simple_vocab_16e6.txt.gz, is read as well and gives OpenAI's numbers. They are: 256 bytes, 256 bytes that end a word,
the merges in the order they were learnt, then [SOT] and [EOT]. So [EOT] is the largest, by which CLIP finds it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence

import click
import numpy as np
import tokenizers
import torch
import yaml
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from pipeline.core.command import exit_codes
from pipeline.core.errors import DataError, UserError
from pipeline.core.files import read_checked, split_file
from pipeline.core.progress import Progress, say
from pipeline.shards.text import mend
from pipeline.stream.reader import open_dataset

# Captions are tokenized by the loader's threads, which are parallel enough; said aloud, it also keeps forks quiet.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SIZE, LENGTH = 49408, 77  # OpenAI's: tokens there are, tokens a caption
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_END = "</w>"  # ends a word's last token
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # printable stand-ins for the 256 bytes, in OpenAI's order
_BASE = [*_BYTES, *(b + _END for b in _BYTES)]
# OpenAI's also matches the marks: here a caption that spells one out has it as plain text, and cannot end itself.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """As CLIP's basic_clean and whitespace_clean: mended, HTML entities resolved twice, single spaces, lower case."""
    return re.sub(r"\s+", " ", mend(text).strip()).lower()


class Tokenizer:
    """Safe to use from several threads; picklable. Made by `train` or `load`."""

    def __init__(self, merges: Sequence[tuple[str, ...]], file: bytes | None = None) -> None:
        """`merges`, first learnt first; `file`: what they were read from. Raises ValueError for what is no merge of known tokens."""
        vocabulary = {token: number for number, token in enumerate(_BASE)}
        for number, pair in enumerate(merges, start=1):
            if len(pair) != 2 or not all(part in vocabulary for part in pair):
                raise ValueError(f"merge {number} is not of two tokens that stand before it")
            vocabulary.setdefault("".join(pair), len(vocabulary))
        self.sot, self.eot, self.size = len(vocabulary), len(vocabulary) + 1, len(vocabulary) + 2
        self._vocabulary = vocabulary | dict(zip(_MARKS, (self.sot, self.eot), strict=True))
        self._engine = _engine(models.BPE(self._vocabulary, [(left, right) for left, right in merges], end_of_word_suffix=_END))
        self._file = file or self._engine.to_str().encode()

    @property
    def hash(self) -> str:
        """sha256 of the file it was loaded from, which is the file that `save` writes."""
        return hashlib.sha256(self._file).hexdigest()

    @staticmethod
    def train(captions: Iterable[str], size: int = SIZE) -> Tokenizer:
        """BPE on `captions` (Sennrich et al. 2016), up to `size` tokens: fewer where no pair of tokens is left that occurs twice.
        The order of the captions does not matter.

        Raises:
            DataError: the captions hold no pair that occurs twice.
        """
        least = len(_BASE) + len(_MARKS) + 1
        if size < least:
            raise UserError(f"size: {size} is too small (allowed: {least} or more, for the bytes alone take {least - 1})")
        engine = _engine(models.BPE(end_of_word_suffix=_END))
        # Naming the bytes as special puts them first, in this order: else their numbers, and by ties the merges, change by chance.
        learner = trainers.BpeTrainer(
            vocab_size=size - len(_MARKS), min_frequency=2, special_tokens=_BASE, end_of_word_suffix=_END, show_progress=False
        )
        engine.train_from_iterator(map(clean, captions), learner)
        merges = json.loads(engine.to_str())["model"]["merges"]
        if not merges:
            raise DataError("the captions hold too little text to learn tokens from")
        return Tokenizer([tuple(pair) for pair in merges])

    @staticmethod
    def load(url: str, sha256: str | None = None, endpoint: str | None = None) -> Tokenizer:
        """A tokenizer.json of ours or OpenAI's vocabulary, at a path or a URL that fsspec reads, http among them.

        Raises:
            DataError: there is no such file, its sha256 is another, or it is neither of the two.
        """
        data = read_checked(url, sha256, endpoint)
        try:
            return Tokenizer.parse(data)
        except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error) as e:
            why = f"it has no {e}" if isinstance(e, KeyError) else str(e)
            raise DataError(f"{url}: is damaged, or neither a tokenizer.json made here nor OpenAI's vocabulary ({why})") from e

    @staticmethod
    def parse(data: bytes) -> Tokenizer:
        """The content of such a file; errors of many kinds where it is none."""
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        if text.startswith("{"):
            values = json.loads(text)["model"]
            tokenizer = Tokenizer([tuple(pair) for pair in values["merges"]], data)
            if values["vocab"] != tokenizer._vocabulary:
                raise ValueError("its tokens are not numbered as CLIP's")
            return tokenizer
        first, *lines = text.split("\n")
        if "#version" not in first:
            raise ValueError("its first line names no #version")
        used = lines[: SIZE - len(_BASE) - len(_MARKS)]  # the published file holds more
        return Tokenizer([tuple(line.split()) for line in used if line], data)

    def to_json(self) -> str:
        """As a tokenizer.json, whatever it was loaded from."""
        return self._engine.to_str()

    def save(self, url: str, endpoint: str | None = None) -> None:
        directory, name = split_file(url, endpoint)
        directory.write(name, self._file)

    def __call__(self, texts: Sequence[str], length: int = LENGTH) -> torch.Tensor:
        """int64 (B, length): [SOT], the caption's tokens, as many as fit, [EOT], then zeros."""
        rows = np.zeros((len(texts), length), dtype=np.int64)  # a tensor's rows take ten times as long to fill
        cleaned = [clean(text) for text in texts]
        for row, found in zip(rows, self._engine.encode_batch_fast(cleaned, add_special_tokens=False), strict=True):
            ids = [self.sot, *found.ids[: length - 2], self.eot]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """The text of one caption's tokens (length,), up to the first [EOT]: what `clean` made of it, but for spaces."""
        ids = [int(token) for token in tokens]
        ids = ids[: ids.index(self.eot)] if self.eot in ids else ids
        return self._engine.decode([i for i in ids if i != self.sot]).replace(_END, " ").strip()


def _engine(model: models.BPE) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(model)
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    return engine


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dataset")
@click.argument("out", metavar="OUT.json")
@click.option("--size", type=click.IntRange(min=len(_BASE) + len(_MARKS) + 1), default=SIZE, show_default=True, help="Tokens, at most.")
@click.option("--split", default="train", show_default=True)
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of the S3-compatible store that the URLs are of.")
def main(dataset: str, out: str, size: int, split: str, endpoint: str | None) -> None:
    """Learn a tokenizer from the captions of DATASET, and write it to OUT.json."""
    with exit_codes():
        directory, name = split_file(out, endpoint)
        directory.check_writable()
        samples = open_dataset(dataset, split, endpoint)

        def captions() -> Iterator[str]:
            with Progress("captions", len(samples), "captions") as progress:
                for number in range(len(samples)):
                    yield samples[number].text
                    progress.update()
            say("learning the merges")

        tokenizer = Tokenizer.train(captions(), size)
        tokenizer.save(out, endpoint)
    few = "" if tokenizer.size == size else f" (the captions yield no more of the {size:,})"
    click.echo(f"tokens  {tokenizer.size:,}{few}")
    click.echo(f"sha256  {tokenizer.hash}")
    section = {"text": {"tokenizer": f"{directory.url}/{name}", "sha256": tokenizer.hash}}
    click.echo("config  " + yaml.safe_dump(section, default_flow_style=True, width=10**6, sort_keys=False).strip()[1:-1])


if __name__ == "__main__":
    main()
