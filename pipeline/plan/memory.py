"""The memory of one worker, moment by moment of a step, as DeepSpeed's ZeRO (0.19.8) and torch hold it.

    start     the model is built whole, in fp32
    forward   activations rise                          parameters (stage 3: gathered as they are used)
    backward  activations fall, gradients rise          stages 2 and 3 move them into a bucket at once
    reduce    a bucket, and its flat copy on its way through the collective
    update    gradients of the own part in fp32, and what the optimiser's formula needs on the way

`peak` is the fullest of these moments, not the sum of all items. Shapes: P parameters, w workers, n = ceil(P / w) of one worker's part.
Stages: Rajbhandari et al. 2020 (arXiv 1910.02054, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.pretrain import Optimizer
from pipeline.plan.live import Live

# DeepSpeed's defaults, in numbers (runtime/zero/config.py); train/settings.py makes the first no larger than the model.
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
MAX_LIVE = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
PERSISTENCE = 100_000
HEAP_BELOW = 32 * 2**20  # bytes; smaller tensors lie in glibc's heap, which keeps what is freed (train/worker.keep_memory)
# What is neither ours nor torch's to account for: on a CPU libraries' work space and Python's objects (measured: 0.08 to 0.14 GiB); on a
# GPU CUDA's context and NCCL's channels (about 0.5 and 1 GiB, not measured here).
RUNTIME_CPU, RUNTIME_GPU = 100 * 2**20, 3 * 2**29
# Of a CPU's heap, beside what lies in it: holes between activations and gradients, and what gloo and its threads take where there is more
# than one worker. What was measured above the rest, in 16 runs (tests/bench/RESULTS.md).
HOLES, GLOO = 0.12, 100 * 2**20

ITEMS = ("parameters", "gradients", "optimizer", "averages", "activations", "logits", "buffers", "temporaries", "runtime", "allocator")
Amounts = dict[str, int]


@dataclass(frozen=True)
class Tensors:
    """A model's parameters as memory sees them: how many numbers there are, in the largest tensor, in those below `HEAP_BELOW` in fp32;
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


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker: each item at its most; the sum at each moment, and the fullest moment's. `host` is what lies in host memory
    beside a GPU: what is offloaded, the checkpoint's copy, batches that wait."""

    items: Amounts
    moments: Amounts
    at_peak: Amounts
    host: Amounts = field(default_factory=dict)
    buckets: Amounts = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def peak_at(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def parameters(self) -> int:
        return self.items["parameters"]

    @property
    def gradients(self) -> int:
        return self.items["gradients"]

    @property
    def optimizer(self) -> int:
        return self.items["optimizer"]

    @property
    def activations(self) -> int:
        return self.items["activations"]

    @property
    def total(self) -> int:
        return self.peak


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


def _temporaries(optimizer: Optimizer, numbers: int) -> int:
    """What a step needs on the way, for flat tensors of `numbers`: nothing of torch's optimisers, which are fused; of ours, whose update
    depends on whole parameters (train/optimizers.py), two tensors of that size."""
    return 0 if optimizer.name in ("adamw", "adam", "sgd") else 8 * numbers


def memory_of(s: Setup) -> Memory:
    """Raises nothing: what does not fit anywhere is a number too."""
    share = -(-s.tensors.parameters // s.workers)
    build = BUILDERS[s.stage](s, share)
    moments = {name: build.amounts(name) for name in ("start", "forward", "backward", "reduce", "update")}
    if s.on_cpu:
        _keep_freed(moments, s)
    sums = {name: sum(each.values()) for name, each in moments.items()}
    items = {item: max(each.get(item, 0) for each in moments.values()) for item in ITEMS}
    fullest = max(sums, key=lambda name: sums[name])
    host = {name: size for name, size in build.host().items() if size}
    return Memory(items, sums, {k: v for k, v in moments[fullest].items() if v}, host, build.buckets())


def _keep_freed(moments: dict[str, Amounts], s: Setup) -> None:
    """glibc's heap gives nothing back: it stays as large as it was at its fullest, and later small tensors lie in it. In it are
    activations and gradients that parameters hold, with holes between them, and the model as it was built; at stage 0 the parameters
    themselves and their moments."""
    small = s.tensors.small / max(1, s.tensors.parameters)
    built = 4 * s.tensors.parameters + (s.width * s.tensors.parameters // s.workers if s.stage == 3 else 0)  # and stage 3's parts
    lying: dict[str, float] = {}
    fullest = 0.0
    for name, each in moments.items():
        loose = each.get("activations", 0) + each.get("logits", 0) + small * each.pop("_held", 0)
        whole = small * (each["parameters"] + each["optimizer"]) if s.stage == 0 else small * built if name == "start" else 0.0
        lying[name] = loose + whole
        fullest = max(fullest, (1 + HOLES) * loose + whole)
    for name, each in moments.items():
        each["allocator"] = 0 if name == "start" else round(fullest - lying[name])


class _Stage0:
    """Plain: every worker holds all of it; gradients are summed through flat copies of a bucket."""

    def __init__(self, s: Setup, share: int) -> None:
        self.s, self.share, self.live = s, share, s.live
        self.all = s.tensors.parameters
        self.own = self.all  # numbers that this worker's optimiser steps
        # Alone nothing is summed (train/zero.py).
        self.moved = min(self.all, REDUCE_BUCKET + s.tensors.largest) if s.workers > 1 or s.width < 4 else 0

    def amounts(self, moment: str) -> Amounts:
        base, more = self.base(), getattr(self, moment)()
        return {key: base.get(key, 0) + more.get(key, 0) for key in {**base, **more}}

    def base(self) -> Amounts:
        """What is there at every moment, after the start."""
        s = self.s
        state = moment_bytes(s.optimizer, s.tensors) * self.own // self.all + self.master()
        return {
            "parameters": self.parameters(),
            "optimizer": 0 if s.offload != "none" and not s.on_cpu else state,
            "averages": 4 * self.own if s.has_average and (s.offload == "none" or s.on_cpu) else 0,
            "runtime": RUNTIME_CPU + (GLOO if s.workers > 1 else 0) if s.on_cpu else RUNTIME_GPU,
        }

    def parameters(self) -> int:
        return self.s.width * self.all

    def master(self) -> int:
        return 0

    def start(self) -> Amounts:
        return {}

    def passes(self, most: int) -> Amounts:
        """Activations and logits, `most` together."""
        logits = self.live.kept.get("logits", 0)
        return {"activations": most - logits, "logits": logits + self.s.pairs}

    def forward(self) -> Amounts:
        return {**self.passes(self.live.forward), **self.held(self.accumulated())}

    def accumulated(self) -> int:
        """Gradients of the step's earlier micro-batches."""
        return self.s.width * self.all if self.s.rounds > 1 else 0

    def held(self, size: int) -> Amounts:
        """Gradients that lie with the parameters, in tensors of their shapes."""
        return {"gradients": size, "_held": size} if self.s.on_cpu else {"gradients": size}

    def backward(self) -> Amounts:
        """On a CPU a gradient, larger than the activations that were freed before it, does not fit into the holes they leave."""
        if self.s.rounds > 1 or self.s.on_cpu:
            return {**self.passes(self.live.most), **self.held(self.s.width * self.all)}
        rising = self.live.most_with_gradients - self.live.most  # what gradients add to the activations' own peak
        return {**self.passes(self.live.most), **self.held(rising)}

    def reduce(self) -> Amounts:
        return {**self.held(self.s.width * self.all), "buffers": self.s.width * self.moved}

    def update(self) -> Amounts:
        numbers = self.s.tensors.largest if self.s.on_cpu else self.all
        return {**self.held(self.s.width * self.all), "temporaries": _temporaries(self.s.optimizer, numbers)}

    def host(self) -> Amounts:
        """The checkpoint's copy is of this worker's fragments: fp32 weights, moments, average (checkpoint/memory.py)."""
        s = self.s
        if s.on_cpu:
            return {"batches": s.inputs}
        own = self.share * (4 + (4 if s.has_average else 0)) + moment_bytes(s.optimizer, s.tensors) // s.workers
        offloaded = 0
        if s.offload != "none":  # fp32 weights, their gradients, moments, and the 16-bit result on its way back
            offloaded = (8 + s.width + (4 if s.has_average else 0)) * self.own + moment_bytes(s.optimizer, s.tensors) // s.workers
        parameters = s.width * self.own if s.offload == "all" else 0
        return {"checkpoint": own, "optimizer": offloaded, "parameters": parameters, "batches": s.inputs}

    def buckets(self) -> Amounts:
        return {"reduce_bucket_size": min(self.all, REDUCE_BUCKET) * self.s.width}


class _Stage12(_Stage0):
    """The optimiser's state in n; at stage 2 each gradient goes into the bucket as it is made, and of the sum a worker keeps its part."""

    def __init__(self, s: Setup, share: int) -> None:
        super().__init__(s, share)
        self.own = share
        self.full = min(self.all, REDUCE_BUCKET)  # numbers of the fullest bucket
        self.bucket = s.width * self.full  # all of it is there from the first gradient on; a CPU's memory comes as it is written to

    def master(self) -> int:
        return 4 * self.own  # in fp32 too: DeepSpeed clones the part that it steps

    def start(self) -> Amounts:
        return {"parameters": 4 * self.all - self.s.width * self.all, "buffers": self.s.width * self.all}  # and its flat copy

    def accumulated(self) -> int:
        return 0 if self.s.rounds == 1 else self.s.width * (self.all if self.s.stage == 1 else self.own)

    def forward(self) -> Amounts:
        gradients = self.held(self.accumulated()) if self.s.stage == 1 else {"gradients": self.accumulated()}
        return {**self.passes(self.live.forward), **gradients}

    def backward(self) -> Amounts:
        s = self.s
        if s.stage == 1:
            return {**super().backward(), "buffers": 0 if s.on_cpu else self.bucket}
        # What the gradients that were made have filled of the bucket, while activations fall.
        filled = self.live.most_with_gradients - self.live.most if s.on_cpu else self.bucket
        return {**self.passes(self.live.most), "gradients": self.accumulated(), "buffers": filled}

    def reduce(self) -> Amounts:
        s = self.s
        left = 1 - self.full / self.all  # of the backward pass, when the first bucket is full
        rest = s.width * (self.all - self.full) if s.stage == 1 else 0
        part = self.accumulated() if s.stage == 2 else 0
        late = {"activations": round(left * self.live.kept_bytes) if s.stage == 2 else 0}
        flat = s.width * self.full
        return {**late, "gradients": max(rest, s.width * self.own - flat, 0) + part, "buffers": self.bucket + flat}

    def update(self) -> Amounts:
        """Both groups of parameters, with weight decay and without, keep their gradients until the last is stepped."""
        s = self.s
        if s.offload != "none" and not s.on_cpu:
            return {"gradients": 0, "buffers": 4 * s.tensors.largest * s.width // 4}
        flat = 4 * self.own
        step = max(_temporaries(s.optimizer, self.own), s.width * self.own if s.width < 4 else 0)
        return {"gradients": s.width * self.own + flat, "temporaries": step}


class _Stage3(_Stage12):
    """Parameters too: each is gathered before it is used, and stays while at most `MAX_LIVE` numbers are there."""

    def __init__(self, s: Setup, share: int) -> None:
        super().__init__(s, share)
        self.gathered = 0 if s.workers == 1 else s.width * min(self.all, MAX_LIVE + PREFETCH_BUCKET)
        self.stepped = min(self.own, SUB_GROUP)

    def base(self) -> Amounts:
        flat = {"gradients": self.s.width * self.own, "buffers": self.bucket}  # made once, kept
        if self.s.offload != "none" and not self.s.on_cpu:
            flat["gradients"] = 0
        return {**super().base(), **flat}

    def parameters(self) -> int:
        secondary = self.s.width * self.all // self.s.hpz if self.s.hpz > 1 else 0
        return (0 if self.s.offload == "all" and not self.s.on_cpu else self.s.width * self.own) + secondary

    def start(self) -> Amounts:
        whole = 4 * self.all - self.s.width * self.own
        return {"parameters": whole}

    def forward(self) -> Amounts:
        return {**self.passes(self.live.forward), "parameters": self.gathered}

    def backward(self) -> Amounts:
        return {**self.passes(self.live.most), "parameters": self.gathered}

    def reduce(self) -> Amounts:
        """Parameters are let go as the backward pass leaves them. gloo reduces a copy of its own."""
        left = 1 - self.full / self.all
        flat = self.s.width * self.full * (2 if self.s.on_cpu else 1)
        return {"activations": round(left * self.live.kept_bytes), "parameters": round(left * self.gathered), "temporaries": flat}

    def update(self) -> Amounts:
        s = self.s
        if s.offload != "none" and not s.on_cpu:
            return {}
        step = max(_temporaries(s.optimizer, self.stepped), s.width * self.stepped if s.width < 4 else 0)
        return {"gradients": 4 * self.stepped, "temporaries": step}

    def buckets(self) -> Amounts:
        return {
            **super().buckets(),
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET * self.s.width,
            "stage3_max_live_parameters": MAX_LIVE * self.s.width,
            "stage3_param_persistence_threshold": PERSISTENCE * self.s.width,
            "sub_group_size": SUB_GROUP * 4,
        }


BUILDERS: dict[int, type[_Stage0]] = {0: _Stage0, 1: _Stage12, 2: _Stage12, 3: _Stage3}
