"""`python -m pipeline.shards.digits DIR`: real images that every machine has, as people keep them.

scikit-learn's 1,797 scanned digits (8x8, UCI "Optical Recognition of Handwritten Digits"), as grey PNG files, dark ink on
white paper, in a class-per-folder tree, with a caption beside each.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.core.errors import ExitCode

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_files() -> Iterator[tuple[str, bytes]]:
    """(relative path, bytes) of each file: `7/0007.png` and `7/0007.txt`, numbered as scikit-learn orders them."""
    digits = load_digits()
    for number, (grey, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = 255 - np.round(grey * 255 / 16).astype(np.uint8)  # 0 (paper) to 16 (ink) in the original
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        yield f"{label}/{number:04d}.png", png.getvalue()
        yield f"{label}/{number:04d}.txt", f"a scan of the digit {WORDS[label]}".encode()


def write_digits(folder: Path) -> tuple[int, int]:
    """(images in all, files that had to be written); what is there already and the same is left alone."""
    images = written = 0
    for path, data in digit_files():
        file = folder / path
        images += file.suffix == ".png"
        if not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            written += 1
    return images, written


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs/data/digits")
def main(folder: Path) -> None:
    """Write scikit-learn's 1,797 scanned digits as image files under FOLDER, a folder a class."""
    try:
        images, written = write_digits(folder)
    except OSError as e:
        click.echo(f"digits: cannot write {folder} ({e})", err=True)
        sys.exit(ExitCode.PREFLIGHT)
    click.echo(f"{images:,} scanned digits in {folder} ({written:,} files written)")


if __name__ == "__main__":
    main()
