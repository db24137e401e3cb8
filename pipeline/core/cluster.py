"""The Ray that a process joins or starts; what runs there, each stage says."""

from __future__ import annotations

import logging
import os


def connect_ray(local: bool) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a task that asks for no GPU sees none
    import ray

    # What workers have to say comes through the relay of the stage; their raw output stays in Ray's log files.
    ray.init(
        address="local" if local else "auto", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if local else None
    )
