"""What was measured here, for later plans: `--plan --calibrate` makes a few real steps in a process of its own, alone, and keeps what they
took by model, precision, micro-batch and device in tessera/calibration.json of the user's state directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, fingerprint
from pipeline.core.errors import ConfigError
from pipeline.plan.devices import Device
from pipeline.plan.pace import Measured
from pipeline.plan.workload import Workload

_STEPS = 4  # the first does not count; the median of the others outlives one during which the machine stalled


def calibration_file() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state"))
    return state / "tessera" / "calibration.json"


def find_measured(load: Workload, device: Device) -> Measured | None:
    """What was measured of this model at this micro-batch on such a device, for `load`'s share of the update."""
    found = _read().get(_key(load, device))
    if not isinstance(found, dict) or "first_pass_seconds" not in found:  # of a version that did not measure it
        return None
    share = 1 / load.workers if load.stage else 1.0
    return Measured(found["micro_batch_seconds"], found["update_seconds"] * share, found["memory_ratio"], found["first_pass_seconds"])


def calibrate(config: Config, load: Workload, device: Device) -> Measured:
    """Measure, keep and give it.

    Raises:
        ConfigError: the plan is for another device than this machine's, or the steps failed.
    """
    values = config.model_dump(mode="json", by_alias=True)
    values["pretrain"]["zero"]["hpz"] = 1  # alone there is nobody to share with
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(values))
        command = [sys.executable, "-m", "pipeline.train.trial", str(file), str(load.facts.classes), "1", str(_STEPS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ConfigError(f"--calibrate: the steps failed ({(done.stderr.strip().splitlines() or ['no word'])[-1]})")
    trial = json.loads(lines[-1])
    if not _is_of(trial["device"], device):
        raise ConfigError(
            f"--calibrate: this machine has {trial['device']!r}, and the plan is for {device.name}; calibrate on one of those"
        )
    p = load.pretrain
    zero = p.zero.model_copy(update={"hpz": 1})
    alone = replace(load, workers=1, pretrain=p.model_copy(update={"batch": p.micro_batch, "zero": zero}))
    kept = {
        "micro_batch_seconds": trial["micro_batch_seconds"],
        "first_pass_seconds": trial["first_pass_seconds"],
        "update_seconds": trial["update_seconds"],
        "memory_ratio": trial["peak_bytes"] / alone.memory.peak,
    }
    target = calibration_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    written = target.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({**_read(), _key(load, device): kept}, indent=1))
    written.replace(target)
    measured = find_measured(load, device)
    assert measured is not None, "it was kept just now"
    return measured


def _is_of(found: str, device: Device) -> bool:
    """Whether torch's name of a device is that of the plan's, as `devices` matches them."""
    return device.name in found.lower()


def _key(load: Workload, device: Device) -> str:
    p = load.pretrain
    return fingerprint({
        "model": p.model.name, "options": load.options.model_dump(mode="json"), "objective": p.objective.name, "precision": p.precision,
        "micro_batch": p.micro_batch, "recompute": load.recompute, "compile": p.compile, "stage": load.stage, "offload": p.zero.offload,
        "optimizer": p.optimizer.name, "average": load.has_average, "deepspeed": p.deepspeed, "device": device.name,
    })  # fmt: skip


def _read() -> dict[str, Any]:
    """What is kept; nothing where the file is not there or damaged: it can be measured again."""
    try:
        kept = json.loads(calibration_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
