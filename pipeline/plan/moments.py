"""What one worker holds at each moment of a step, by ZeRO stage, as DeepSpeed 0.19.8 and torch hold it.

    start     the model is built whole, in fp32, and copied
    forward   activations rise                          parameters (stage 3: gathered as they are used)
    backward  activations fall, gradients rise          stages 2 and 3 move them into a bucket at once
    reduce    a bucket, and its flat copy on its way through the collective
    update    gradients of the own part in fp32, and what the optimiser's formula needs on the way

Shapes: P parameters, w workers, n = ceil(P / w) of one worker's part. Stages: Rajbhandari et al. 2020 (arXiv 1910.02054, section 5).
What lies in a CPU's heap is named beside the rest, with an underscore; `memory.py` says what follows from that.
"""

from __future__ import annotations

from pipeline.config.pretrain import Optimizer
from pipeline.plan.setup import (
    MAX_LIVE,
    PERSISTENCE,
    PREFETCH_BUCKET,
    REDUCE_BUCKET,
    RUNTIME_CPU,
    RUNTIME_GPU,
    SUB_GROUP,
    SUM_BUCKET,
    Setup,
    moment_bytes,
)  # fmt: skip

Amounts = dict[str, int]


def _temporaries(optimizer: Optimizer, numbers: int) -> int:
    """What a step needs on the way, for flat tensors of `numbers`: nothing of torch's optimisers, which are fused; of ours, whose update
    depends on whole parameters (train/optimizers.py), two tensors of that size."""
    return 0 if optimizer.name in ("adamw", "adam", "sgd") else 8 * numbers


class _Stage0:
    """Plain: every worker holds all of it. Gradients are summed through flat copies of a bucket; those in fp32 lie in small buckets of
    their own, which stay from the first step on (train/overlap.py)."""

    def __init__(self, s: Setup, share: int) -> None:
        self.s, self.share, self.live = s, share, s.live
        self.all = s.tensors.parameters
        self.own = self.all  # numbers that this worker's optimiser steps
        self.stays = s.stage == 0 and s.width == 4 and s.workers > 1  # whether gradients lie in buckets that do
        self.full = min(self.all, SUM_BUCKET if self.stays else REDUCE_BUCKET)  # numbers of the fullest bucket
        is_summed = s.workers > 1 or s.width < 4  # alone nothing is (train/zero.py)
        self.moved = s.tensors.largest if self.stays else is_summed * min(self.all, self.full + s.tensors.largest)

    def amounts(self, moment: str) -> Amounts:
        base, more = self.base(), getattr(self, moment)()
        if moment == "start":  # the rest is made later
            base = {"runtime": base["runtime"]}
        return {key: base.get(key, 0) + more.get(key, 0) for key in {**base, **more}}

    def base(self) -> Amounts:
        """What is there at every moment, after the start."""
        s = self.s
        state = moment_bytes(s.optimizer, s.tensors) * self.own // self.all + self.master()
        return {
            "parameters": self.parameters(),
            "gradients": s.width * self.all if self.stays else 0,
            "optimizer": 0 if s.offload != "none" and not s.on_cpu else state,
            "averages": 4 * self.own if s.has_average and (s.offload == "none" or s.on_cpu) else 0,
            "runtime": RUNTIME_CPU if s.on_cpu else RUNTIME_GPU,
        }

    def parameters(self) -> int:
        return self.s.width * self.all

    def master(self) -> int:
        return 0

    def start(self) -> Amounts:
        return {"parameters": 4 * self.all}

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
        return {} if self.stays else {"gradients": size, "_heap": self.small(size)}

    def small(self, size: int) -> int:
        """Of `size` bytes in tensors of the parameters' shapes, those in a CPU's heap."""
        return size * self.s.tensors.small // self.all if self.s.on_cpu else 0

    def backward(self) -> Amounts:
        """In a CPU's heap a gradient, larger than the activations that were freed before it, does not fit into the holes they leave."""
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
        return {"reduce_bucket_size": self.full * self.s.width}


class _Stage12(_Stage0):
    """The optimiser's state in n; at stage 2 each gradient goes into the bucket as it is made, and of the sum a worker keeps its part."""

    def __init__(self, s: Setup, share: int) -> None:
        super().__init__(s, share)
        self.own = share
        self.full = min(self.all, REDUCE_BUCKET)
        self.bucket = s.width * self.full  # all of it is there from the first gradient on; a CPU's memory comes as it is written to

    def base(self) -> Amounts:
        """Offloaded on a CPU, which is where it is anyway: beside the part its gradient, always, the result in the model's type on its way
        back, and room for the largest tensor twice."""
        s = self.s
        if s.offload == "none" or not s.on_cpu or s.stage == 3:
            return super().base()
        return {**super().base(), "gradients": 4 * self.own, "buffers": s.width * (self.own + 2 * s.tensors.largest)}

    def master(self) -> int:
        return 4 * self.own  # in fp32 too: DeepSpeed clones the part that it steps

    def start(self) -> Amounts:
        """In fp32, then in the model's type with its flat copy."""
        return {"parameters": self.s.width * self.all, "buffers": max(4 - self.s.width, self.s.width) * self.all}

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
        taken = s.width * self.own if s.offload == "none" or not s.on_cpu else 0  # of the sum, once the flat copy is gone
        return {**late, "gradients": max(rest, taken - flat, 0) + part, "buffers": self.bucket + flat}

    def update(self) -> Amounts:
        """Both groups of parameters, with weight decay and without, keep their gradients until the last is stepped."""
        s = self.s
        if s.offload != "none":
            return {} if s.on_cpu else {"buffers": s.width * s.tensors.largest}
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
        if self.s.offload != "none":
            flat["gradients"] = flat["gradients"] + 4 * self.own if self.s.on_cpu else 0  # in fp32 too
        return {**super().base(), **flat}

    def parameters(self) -> int:
        secondary = self.s.width * self.all // self.s.hpz if self.s.hpz > 1 else 0
        return (0 if self.s.offload == "all" and not self.s.on_cpu else self.s.width * self.own) + secondary

    def start(self) -> Amounts:
        return {"parameters": 4 * self.all}  # divided one after the other

    def forward(self) -> Amounts:
        return {**self.passes(self.live.forward), **self.gather()}

    def backward(self) -> Amounts:
        return {**self.passes(self.live.most), **self.gather()}

    def gather(self) -> Amounts:
        """Parameters arrive in flat tensors, out of which each is copied; gloo fills a copy of its own first."""
        flat = min(self.gathered, self.s.width * PREFETCH_BUCKET) * (2 if self.s.on_cpu else 1)
        return {"parameters": self.gathered, "temporaries": flat, "_heap": self.small(self.gathered)}

    def reduce(self) -> Amounts:
        """Parameters are let go as the backward pass leaves them. gloo reduces a copy of its own."""
        left = 1 - self.full / self.all
        flat = self.s.width * self.full * (2 if self.s.on_cpu else 1)
        late = round(left * self.gathered)
        return {"activations": round(left * self.live.kept_bytes), "parameters": late, "temporaries": flat, "_heap": self.small(late)}

    def update(self) -> Amounts:
        s = self.s
        if s.offload != "none":
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
