"""python launch/plans.py CONFIG .. --gpus 8 --gpus 64: the plans of several configs at several sizes, as one Markdown table."""

from __future__ import annotations

import click

from pipeline.config import load_config
from pipeline.core.command import exit_codes
from pipeline.core.units import format_bytes, format_seconds

HEAD = ("config", "GPUs", "ZeRO", "micro-batch", "memory a GPU", "sent a GPU and step", "step", "MFU", "hours", "GPU-hours", "cost")


def table(configs: tuple[str, ...], gpus: tuple[int, ...], device: str) -> str:
    """One row a config and number of GPUs; of a config that does not fit, what would make it."""
    from pipeline.plan.fit import as_typed, smallest_change
    from pipeline.preflight import check_config, plan_config, settle_config

    rows = [HEAD, tuple("---" for _ in HEAD)]
    for file in configs:
        for count in gpus:
            config = load_config(file, [f"cluster.gpus={count}", f"cluster.device={device}"])
            check_config(config)
            config = settle_config(config)
            plan, _, _ = plan_config(config)
            if plan is None or config.pretrain is None:
                continue
            p, pace = config.pretrain, plan.pace
            fit = "" if plan.fits else f", does not fit: {as_typed(smallest_change(plan.load, plan.device.memory))}"
            rows.append((
                config.name, f"{count}", f"{p.zero.stage}", f"{p.micro_batch}", format_bytes(plan.peak) + fit,
                format_bytes(plan.traffic.total), format_seconds(pace.step), f"{pace.mfu:.0%}", f"{plan.hours:,.0f}",
                f"{plan.gpu_hours:,.0f}", f"{plan.cost:,.0f} {config.cluster.currency}",
            ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@click.command()
@click.argument("configs", nargs=-1, required=True)
@click.option("--gpus", multiple=True, type=click.IntRange(min=1), default=(8, 64), show_default=True, help="How many; several times.")
@click.option("--device", default="h100", show_default=True, help="Of the plan's table.")
def main(configs: tuple[str, ...], gpus: tuple[int, ...], device: str) -> None:
    """Print the plans of CONFIGS; start nothing."""
    with exit_codes():
        click.echo(table(configs, gpus, device))


if __name__ == "__main__":
    main()
