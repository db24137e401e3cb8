"""DeepSpeed itself: imported without its noise, the process group that it works in, and what of a config it would take."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib.abc import MetaPathFinder
from typing import Any, get_args

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed.constants import default_pg_timeout

from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError, InfrastructureError, choose
from pipeline.core.world import JOINED, World
from pipeline.train.settings import SECTIONS, WHERE, settings


def import_deepspeed() -> Any:
    """DeepSpeed, without what it says while it is imported, without the shared-memory operator that it would otherwise compile for half a
    minute at the first start (it serves only `inference_all_reduce`), and without MLflow, which its autotuner would import: two seconds of
    every rank's start."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), _hidden("mlflow"):
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not torch.cuda.is_available():
            deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """In this block, this thread cannot import the module `name`, unless it was imported before. Other threads can."""
    thread = threading.get_ident()

    class Hidden(MetaPathFinder):
        def find_spec(self, wanted: str, *_: Any) -> None:
            if wanted == name and threading.get_ident() == thread:
                raise ModuleNotFoundError(f"{name} is hidden here", name=name)

    finder = Hidden()
    # Other threads may be going through the list: they keep theirs.
    sys.meta_path = [finder, *sys.meta_path]
    try:
        yield
    finally:
        sys.meta_path = [each for each in sys.meta_path if each is not finder]


def join_group(world: World, within: timedelta = JOINED) -> None:
    """Join the process group of all ranks: the one that Ray Train made, or one of our own under torchrun or alone.

    Raises:
        InfrastructureError: not all ranks have come `within` this time.
    """
    deepspeed = import_deepspeed()
    # DeepSpeed calls collectives by names that torch 2.13 has begun to replace.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.cuda.is_available():
        torch.cuda.set_device(world.device)
    if not dist.is_initialized() and world.size == 1:
        # Alone: a store in memory needs no port, which a second run on this machine could hold.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False, timeout=within)
    except RuntimeError as e:  # of the store, of gloo or of NCCL
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InfrastructureError(
            f"pretrain: rank {world.rank} of {world.size} could not join the others at {where} within {within.total_seconds():.0f} s "
            f"({str(e).splitlines()[0]}); the same command may succeed once all of them start"
        ) from e
    # From now on ranks may wait for each other longer, as for a store that is away; also in a group that Ray Train made.
    dist.distributed_c10d._set_pg_timeout(default_pg_timeout)


def check_precision(precision: str) -> None:
    """Raises ConfigError for a precision that this machine's device cannot train in."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("pretrain.precision: 'fp16' needs a GPU (allowed on a CPU: bf16, fp32)")


def is_slow(precision: str) -> bool:
    """Whether this machine would train in `precision` at a small part of the speed that it has in fp32: a CPU without instructions for
    bf16 multiplies matrices in it 10 to 60 times slower (AVX2, torch 2.13)."""
    if precision != "bf16" or torch.cuda.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def check_deepspeed(config: Pretrain) -> None:
    """Raises ConfigError for what `pretrain.deepspeed` passes on and DeepSpeed would not take."""
    if not config.deepspeed:
        return
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = (DeepSpeedZeroConfig, DeepSpeedBF16Config, DeepSpeedFP16Config, CommsLoggerConfig)
    merged = settings(config, 1, 1)
    for key, kind in zip(SECTIONS, kinds, strict=False):
        try:
            kind(**merged.get(key, {}))
        except ValidationError as e:
            first = e.errors()[0]
            name = ".".join(str(part) for part in (key, *first["loc"]))
            if first["type"] != "extra_forbidden":
                raise ConfigError(f"{WHERE}.{name}: {first['input']!r} is not taken by DeepSpeed ({first['msg']})") from None
            for part in first["loc"][:-1]:  # of a section in the section
                inner = next(field.annotation for each, field in kind.model_fields.items() if part == (field.alias or each))
                kind = next(each for each in (inner, *get_args(inner)) if hasattr(each, "model_fields"))
            where = f"{WHERE}.{name.rpartition('.')[0]}"
            choose(where, str(first["loc"][-1]), [field.alias or each for each, field in kind.model_fields.items()])
    for name in merged.get("flops_profiler", {}):  # of which DeepSpeed passes over what it does not know
        choose(f"{WHERE}.flops_profiler", name, vars(DeepSpeedFlopsProfilerConfig({})))
