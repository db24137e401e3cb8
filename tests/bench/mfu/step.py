"""One training step (forward, backward, AdamW; no clipping, as the peers' scripts have it) as a recipe says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pipeline.models.blocks import Block, Mlp
from pipeline.models.fused import RMSNorm
from tests.bench.mfu import fp8, optimizers
from tests.bench.mfu.recipes import Recipe

Loss = Callable[[nn.Module], torch.Tensor]
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Step:
    """`model` with `losses`, one batch each, that it takes in turn; a call is one update, and gives the loss on the device."""

    def __init__(self, model: nn.Module, losses: Sequence[Loss], how: Recipe, device: torch.device) -> None:
        self.model, self.losses, self.how, self.device, self.count = model, losses, how, device, 0
        if how.fp8:
            for block in blocks(model):
                fp8.convert(block)
        if how.recompute:
            recompute(model, how.recompute)
        dtype = torch.bfloat16 if how.weights == "bf16" else torch.float32
        is_compiled = how.compiles != "nothing"
        self.optimizer = optimizers.make(
            model, how.optimizer, dtype, how.lr, compiled=how.backend if is_compiled else None, capturable=how.graph
        )
        model.to(dtype).train()  # buffers
        compile_parts(model, how)

    def __call__(self) -> torch.Tensor:
        if self.how.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with attention(self.how):
            for _ in range(self.how.rounds):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.how.weights == "autocast"):
                    loss = self.losses[self.count % len(self.losses)](self.model)
                self.count += 1
                (loss if self.how.rounds == 1 else loss / self.how.rounds).backward()
        self.optimizer.step()
        return loss.detach()


class Graphed:
    """A step as one CUDA graph: captured after a few steps on a stream of their own, then replayed. It has one batch."""

    def __init__(self, step: Step) -> None:
        if step.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.loss


def attention(how: Recipe) -> AbstractContextManager[Any]:
    """Where a kernel of attention is asked for, only that one is allowed; what it cannot do is then an error."""
    return contextlib.nullcontext() if how.attention == "default" else sdpa_kernel(ATTENTION[how.attention])


def blocks(model: nn.Module) -> list[Block]:
    return [each for each in model.modules() if isinstance(each, Block)]


class Recomputed(nn.Module):
    """Keeps a block's input alone, and computes the block again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return checkpoint(self.block, *arguments, use_reentrant=False, preserve_rng_state=False, **named)  # there is no dropout


def recompute(model: nn.Module, fraction: float) -> None:
    """The first of each stack of blocks, `fraction` of them."""
    for stack in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
        for n in range(round(fraction * len(stack))):
            if isinstance(stack[n], Block):
                stack[n] = Recomputed(stack[n])


def compile_parts(model: nn.Module, how: Recipe) -> None:
    options: dict[str, Any] = {"dynamic": False, "backend": how.backend}
    if how.mode != "default":
        options["mode"] = how.mode
    match how.compiles:
        case "whole":
            model.compile(**options)
        case "blocks":
            for block in blocks(model):
                block.compile(**options)
        case "norms":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm | RMSNorm):
                    module.compile(**options)
                elif isinstance(module, Mlp):
                    module.activation = torch.compile(module.activation, **options)


class DeepSpeedStep:
    """The same through our engine: DeepSpeed, bf16 over fp32, the optimiser that a config would get."""

    def __init__(self, name: str, model: Any, losses: Sequence[Loss], how: Recipe, batch: int) -> None:
        from pipeline.config.pretrain import Pretrain
        from pipeline.core.world import World
        from pipeline.train.library import join_group
        from pipeline.train.optim import build_optimizer
        from pipeline.train.zero import Engine

        world = World()
        join_group(world)
        config = Pretrain.model_validate({
            "model": name, "batch": batch * how.rounds, "micro_batch": batch, "duration": "1000 steps", "precision": "bf16",
            "optimizer": {"lr": how.lr, "weight_decay": optimizers.DECAY},
            "zero": {"stage": how.stage, "offload": "optimizer" if how.offload else "none"},
        })  # fmt: skip
        if how.recompute:
            recompute(model, how.recompute)
        compile_parts(model.train(), how)
        self.engine = Engine(model, build_optimizer(model, config.optimizer), config, how.rounds, world)
        self.losses, self.how, self.count = losses, how, 0

    def __call__(self) -> torch.Tensor:
        with attention(self.how):
            for _ in range(self.how.rounds):
                loss = self.losses[self.count % len(self.losses)](self.engine.module)
                self.count += 1
                self.engine.backward(loss)
                self.engine.step()
        return loss.detach()
