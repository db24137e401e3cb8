"""What memory depends on: a model's tensors, its optimiser, how it is divided, and DeepSpeed's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.pretrain import Optimizer
from pipeline.plan.live import Live

# DeepSpeed's defaults, in numbers (runtime/zero/config.py); train/settings.py makes the first no larger than the model.
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
MAX_LIVE = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
PERSISTENCE = 100_000
SUM_BUCKET = 25 * 2**20 // 4  # numbers; of gradients that are summed where they lie (train/overlap.py)
HEAP_BELOW = 32 * 2**20  # bytes; on a CPU, smaller tensors of a step lie in glibc's heap, which keeps what is freed (train/heap.py)
# What is neither ours nor torch's to account for: on a CPU libraries' work space and Python's objects (measured once the engine was there:
# 0.08 to 0.12 GiB); on a GPU CUDA's context and NCCL's channels (about 0.5 and 1 GiB, not measured here).
RUNTIME_CPU, RUNTIME_GPU = 100 * 2**20, 3 * 2**29


@dataclass(frozen=True)
class Tensors:
    """A model's parameters as memory sees them: how many numbers there are, in the largest tensor, in those below `HEAP_BELOW`;
    `factored`: rows and columns of its matrices, and all numbers of the rest."""

    parameters: int
    largest: int
    small: int
    factored: int


@dataclass(frozen=True)
class Setup:
    """What memory depends on. `width`: bytes of a number of the model; `stage` as the engine runs it; `rounds` micro-batches a worker
    and step; `pairs`: bytes of a contrastive loss over the whole batch; `inputs`: of the batches that wait."""

    tensors: Tensors
    width: int
    stage: int
    workers: int
    rounds: int
    optimizer: Optimizer
    live: Live
    offload: str = "none"
    hpz: int = 1
    has_average: bool = False
    pairs: int = 0
    inputs: int = 0
    on_cpu: bool = False


def moment_bytes(optimizer: Optimizer, tensors: Tensors) -> int:
    """Of the optimiser's moments, of all parameters: m and v of Adam and its kin, the momentum of SGD; of Adafactor (arXiv 1804.04235)
    rows and columns of v, and a momentum in 16 bits."""
    match optimizer.name:
        case "sgd":
            return 4 * tensors.parameters if optimizer.momentum else 0
        case "adafactor":
            return 4 * tensors.factored + (2 * tensors.parameters if optimizer.betas[0] else 0)
        case _:
            return 8 * tensors.parameters
