from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from pipeline.core.functions import load_function, source_hash


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path for modules of a user's own."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def test_a_function_by_its_name(own: Path) -> None:
    (own / "own_package").mkdir()
    (own / "own_package" / "own_module.py").write_text("def keep(sample):\n    return sample['width'] > 1\n")
    function = load_function("shard.filter", "own_package.own_module.keep")
    assert function({"width": 2}) and not function({"width": 1})
    assert load_function("shard.filter", "own_package.own_module.keep") is function


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("keep", r"shard.filter: 'keep' does not name a function \(allowed: package.module.name\)"),
        ("a b.keep", "'a b.keep' does not name a function"),
        ("own_nowhere.keep", "the module own_nowhere of 'own_nowhere.keep' cannot be imported: there is none of this name"),
        ("own_breaks.keep", "the module own_breaks of 'own_breaks.keep' cannot be imported: ZeroDivisionError"),
        ("own_needs.keep", "the module own_needs of 'own_needs.keep' cannot be imported: ModuleNotFoundError: No module named 'own_gone'"),
        ("own_fine.kepe", "the module own_fine has no 'kepe', did you mean 'keep'"),
        ("own_fine.number", "'own_fine.number' is a int, not a function"),
    ],
)
def test_what_is_no_function_is_one_sentence(own: Path, name: str, told: str) -> None:
    (own / "own_breaks.py").write_text("1 / 0")
    (own / "own_needs.py").write_text("import own_gone")
    (own / "own_fine.py").write_text("number = 3\ndef keep(sample): ...\n")
    with pytest.raises(ConfigError, match=told):
        load_function("shard.filter", name)


def test_the_source_of_a_function(own: Path) -> None:
    """The file of its module, read anew each time; and of the module that it was taken from."""
    text = "from functools import wraps\nfrom own_parts.inner import kept\ndef keep(sample): ...\n@wraps(kept)\ndef wrapped(s): return kept(s)\n"
    (own / "own_parts").mkdir()
    (own / "own_parts" / "inner.py").write_text("def kept(sample): ...\nclass Kept:\n    def __call__(self, s): ...\none = Kept()\n")
    (own / "own_parts" / "__init__.py").write_text(text)
    names = [f"own_parts.{name}" for name in ("keep", "kept", "wrapped")] + ["own_parts.inner.one"]
    first = [source_hash("shard.filter", name) for name in names]
    assert first[0] == hashlib.sha256(text.encode()).hexdigest() != first[1] == first[2] and None not in first
    assert first == [source_hash("shard.filter", name) for name in names]
    (own / "own_parts" / "inner.py").write_text("def kept(sample): return True\n")
    second = [source_hash("shard.filter", name) for name in names]
    assert second[0] == first[0] and all(a != b for a, b in zip(first[1:], second[1:], strict=True))

    with zipfile.ZipFile(own / "own.zip", "w") as archive:
        archive.writestr("own_zipped.py", "def keep(sample): ...\n")
    sys.path.insert(0, str(own / "own.zip"))
    try:
        assert source_hash("shard.filter", "own_zipped.keep") == hashlib.sha256(b"def keep(sample): ...\n").hexdigest()
    finally:
        sys.path.remove(str(own / "own.zip"))
    assert source_hash("shard.filter", "builtins.bool") is None
    with pytest.raises(ConfigError, match="the module own_parts has no 'kip'"):
        source_hash("shard.filter", "own_parts.kip")
