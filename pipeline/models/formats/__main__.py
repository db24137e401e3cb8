"""python -m pipeline.models.formats convert|show: checkpoints from one format to another, from and to any URL."""

from __future__ import annotations

import json
from typing import Any

import click
import yaml

from pipeline.core.command import exit_codes
from pipeline.core.errors import UserError
from pipeline.models.formats.read import read
from pipeline.models.formats.write import TARGETS, export

_ENDPOINT = click.option("--endpoint", help="Of the object store, where it is not the usual one.")
_OPTIONS = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of the model, what the file does not say: activation=gelu (repeatable).",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Checkpoints from one format to another, from and to any URL."""


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--to", required=True, type=click.Choice(sorted(TARGETS)), help="hf loads with transformers' from_pretrained.")
@click.option("--force", is_flag=True, help="Write to DST though it is not empty.")
@_OPTIONS
@_ENDPOINT
def convert(src: str, dst: str, to: str, force: bool, options: tuple[str, ...], endpoint: str | None) -> None:
    """Read the checkpoint SRC, in any known format, and write it to the directory DST in another."""
    with exit_codes():
        found = read(src, endpoint=endpoint, **parse_options(options))
        export(found.model(), dst, to, endpoint=endpoint, mean=found.mean, std=found.std, classes=found.classes, force=force)
        click.echo(f"{dst}: {found.name} from {found.format}, as {to}")


@main.command()
@click.argument("src")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_OPTIONS
@_ENDPOINT
def show(src: str, as_json: bool, options: tuple[str, ...], endpoint: str | None) -> None:
    """What the checkpoint SRC holds: format, family, options, parameters."""
    with exit_codes():
        found = read(src, endpoint=endpoint, **parse_options(options))
        facts: dict[str, Any] = {
            "format": found.format,
            "family": found.name,
            "parameters": sum(p.numel() for p in found.model().parameters()),
            "mean": found.mean,
            "std": found.std,
            "classes": None if found.classes is None else len(found.classes),
            "options": found.options,
        }
        if as_json:
            click.echo(json.dumps(facts))
            return
        for key, value in facts.items():
            if key == "options":
                text = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110).rstrip().replace("\n", "\n            ")
            elif key == "parameters":
                text = f"{value:,}"
            else:
                text = "unknown" if value is None else ", ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
            click.echo(f"{key:11} {text}")


def parse_options(given: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` and `section.key=value`, values as YAML. Raises UserError."""
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"--option: {text!r} is no KEY=VALUE")
        *sections, last = key.split(".")
        inner = options
        for section in sections:
            inner = inner.setdefault(section, {})
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise UserError(f"--option: {text!r} has no YAML value") from e
    return options


if __name__ == "__main__":
    main()
