"""The page of a run, or of several: everything one wants to know in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from pipeline import __version__
from pipeline.checkpoint.run import PAGE
from pipeline.config import Config
from pipeline.core.storage import Storage
from pipeline.core.units import format_bytes, format_seconds
from pipeline.evaluate import PROTOCOLS, Result
from pipeline.report.view import Shown, gather

NAMED_CLASSES, NAMED_JOBS = 40, 50


def write_report(run: Storage, config: Config, dataset_url: str | None, command: str) -> str:
    """Publish the page as `<run>/report/index.html`; its URL."""
    run.write(PAGE, build_report(run, config, dataset_url, command).encode())
    return f"{run.url}/{PAGE}"


def write_joint_report(runs: Sequence[Shown], command: str) -> str:
    """Publish one page of several runs in the place of the first's own; its URL."""
    run = runs[0].run
    run.write(PAGE, build_joint_report(runs, command).encode())
    return f"{run.url}/{PAGE}"


def build_report(run: Storage, config: Config, dataset_url: str | None, command: str) -> str:
    """HTML of what is in the run directory; parts whose data is not there are left out.

    `command` is what makes the run again.

    Raises:
        DataError: the dataset is damaged.
    """
    return _environment().get_template("page.html").render(v=gather(Shown(run, config, dataset_url)), title=config.name, command=command)


def build_joint_report(runs: Sequence[Shown], command: str) -> str:
    """As `build_report`, with all scores in one table first, then a section a run; data that several share is shown once."""
    views = [gather(shown) for shown in runs]
    title = ", ".join(view.name for view in views)
    return _environment().get_template("joint.html").render(views=views, title=title, command=command)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": _percent, "seconds": format_seconds, "bytes": format_bytes, "utc": _utc, "called": _called, "explain": _explain,
    }  # fmt: skip
    environment.globals |= {
        "version": __version__, "named_classes": NAMED_CLASSES, "named_jobs": NAMED_JOBS,
    }  # fmt: skip
    return environment


def _called(result: Result) -> str:
    match result.protocol:
        case "few-shot":
            return f"{result.details['shots']}-shot"
        case "layers":
            return f"probe of layer {result.details['best']}"
        case _:
            return result.name


def _explain(result: Result) -> str:
    details = result.details
    match result.protocol:
        case "few-shot":
            return f"least squares on frozen features of {details['shots']} image{'s' if details['shots'] > 1 else ''} a class"
        case "fine-tune":
            return (
                f"all weights trained on for {details['steps']} steps at {details['pixels']} x {details['pixels']} pixels, with a new head"
            )
        case "linear":
            warning = "" if details["converged"] else "; the solver stopped before it converged"
            return PROTOCOLS["linear"] + warning
        case "zero-shot":
            templates = details["templates"]
            many = f"the mean of {len(templates)} captions" if len(templates) > 1 else f'"{templates[0]}"'
            return f"the class whose caption is nearest: {many}"
        case "layers":
            last = details["layers"][-1]
            return f"logistic regression on the layer that is best on held-out images; on the last one it gets {_percent(last['top1'])}"
        case _:
            return PROTOCOLS.get(result.protocol, "")


def _utc(seconds: float) -> str:
    """Seconds since 1970 as `2026-05-01 13:05 UTC`."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _percent(fraction: float, digits: int = 1) -> str:
    """`98.7%`; with as many digits as it takes to tell nearly all from all."""
    while digits < 4 and fraction < 1 and round(100 * fraction, digits) == 100:
        digits += 1
    return f"{100 * fraction:.{digits}f}%"
