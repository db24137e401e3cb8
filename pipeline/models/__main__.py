"""`python -m pipeline.models`: every published model, its parameters, and the floating-point operations of one sample."""

from __future__ import annotations

import json
from typing import Any

import click

from pipeline.core.command import exit_codes
from pipeline.models.model import flops
from pipeline.models.registry import FAMILIES, create, family_of
from pipeline.models.sizes import LISTED


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[NAME ..]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(names: tuple[str, ...], as_json: bool) -> None:
    """List published models (or those named NAME, other patches of published sizes too): parameters, input, and floating-point
    operations of a forward pass of one sample, two a multiply-add. Nothing is allocated."""
    with exit_codes():
        if not as_json:
            click.echo(f"{'name':20} {'family':8} {'input':>5} {'parameters':>14} {'GFLOPs':>9}")
        for name in names or LISTED:
            model = create(name, device="meta")
            facts: dict[str, Any] = {
                "name": name,
                "family": family_of(name),
                "pixels": model.options.model_dump()["pixels"],
                "parameters": model.parameter_count,
                "flops": flops(model),
            }
            if as_json:
                click.echo(json.dumps(facts))
            else:
                click.echo(f"{name:20} {facts['family']:8} {facts['pixels']:>5} {facts['parameters']:>14,} {facts['flops'] / 1e9:>9,.1f}")
        if not as_json and not names:
            click.echo(f"A model of one's own size is made by its family's name: {', '.join(FAMILIES)}")


if __name__ == "__main__":
    main()
