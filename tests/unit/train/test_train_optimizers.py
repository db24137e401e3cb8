"""StableAdamW and Adafactor against their papers' algorithms, written as loops over one parameter in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.train.layout import Layout, Slice, Whole, rectangles
from pipeline.train.optimizers import Adafactor, StableAdamW, _mean
from pipeline.train.state import _new_state

LR, DECAY = 0.1, 0.2


def gradients(shape: tuple[int, ...], steps: int = 5) -> list[np.ndarray]:
    """Small ones, and then one that is large, which is where updates are clipped."""
    random = np.random.default_rng(3)
    return [random.normal(size=shape) * (30 if step == steps - 2 else 1) for step in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, given: list[np.ndarray]) -> np.ndarray:
    for gradient in given:
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype).view_as(parameter)
        optimizer.step()
    return parameter.detach().double().numpy()


def test_stable_adamw_is_algorithm_2() -> None:
    theta, (beta1, beta2), eps = np.full((4, 3), 2.0), (0.9, 0.95), 1e-6
    v, u, clipped = np.zeros((4, 3)), np.zeros((4, 3)), 0
    for t, g in enumerate(gradients((4, 3)), start=1):
        hat1, hat2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (beta1, beta2))
        v, u = hat2 * v + (1 - hat2) * g * g, hat1 * u + (1 - hat1) * g
        rms = math.sqrt(np.mean(g * g / np.maximum(v, eps**2)))
        clipped += rms > 1
        rate = LR / max(1, rms)
        theta = theta - rate * DECAY * theta - rate * u / (np.sqrt(v) + eps)
    assert clipped, "at least once the clipping is at work"
    parameter = torch.full((4, 3), 2.0, dtype=torch.float64, requires_grad=True)
    ours = run(StableAdamW([parameter], lr=LR, betas=(beta1, beta2), eps=eps, weight_decay=DECAY), parameter, gradients((4, 3)))
    assert ours == pytest.approx(theta, rel=1e-6)


def adafactor(shape: tuple[int, int], given: list[np.ndarray], is_factored: bool, momentum: float, cap: float) -> np.ndarray:
    """Algorithm 4 (or, where nothing is factored, the same with each number's own moment), with momentum of the clipped update."""
    theta, m = np.full(shape, 2.0), np.zeros(shape)
    rows, columns, each = np.zeros(shape[0]), np.zeros(shape[1]), np.zeros(shape)
    for t, g in enumerate(given, start=1):
        decay, square = min(cap, 1 - t**-0.8), g * g + 1e-30
        rows = decay * rows + (1 - decay) * square.mean(axis=1)
        columns = decay * columns + (1 - decay) * square.mean(axis=0)
        each = decay * each + (1 - decay) * square
        update = g / np.sqrt(np.outer(rows, columns) / rows.mean() if is_factored else each)
        update = update / max(1, math.sqrt(np.mean(update**2)))
        m = momentum * m + (1 - momentum) * update
        theta = theta - LR * DECAY * theta - LR * (m if momentum else update)
    return theta


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("least", "is_factored"), [(2, True), (5, False)])
def test_adafactor_is_algorithm_4(least: int, is_factored: bool, momentum: float) -> None:
    parameter = torch.full((4, 6), 2.0, requires_grad=True)
    optimizer = Adafactor([parameter], lr=LR, betas=(momentum, 0.6), weight_decay=DECAY, factored_from=least)
    ours = run(optimizer, parameter, gradients((4, 6)))
    theirs = adafactor((4, 6), gradients((4, 6)), is_factored, momentum, cap=0.6)
    # The momentum is kept in bf16, of 8 bits.
    assert ours == pytest.approx(theirs, abs=LR * 2**-7 if momentum else 1e-5)
    assert {extra.key for extra in optimizer.extras(parameter)} == ({"exp_avg_sq_row", "exp_avg_sq_col"} if is_factored else {"exp_avg_sq"})
    assert ("exp_avg" in optimizer.state[parameter]) == bool(momentum)


@pytest.mark.parametrize("kind", ["adafactor", "stable"])
def test_two_parameters_in_one_tensor_are_two(kind: str) -> None:
    """As ZeRO gives them: end to end, here with padding after."""

    def make(parameters: list[torch.Tensor]) -> Adafactor | StableAdamW:
        if kind == "adafactor":
            return Adafactor(parameters, lr=LR, weight_decay=DECAY, factored_from=2)
        return StableAdamW(parameters, lr=LR, weight_decay=DECAY)

    apart = [torch.full((4, 6), 2.0, requires_grad=True), torch.full((5,), 1.0, requires_grad=True)]
    flat = torch.cat([apart[0].detach().flatten(), apart[1].detach(), torch.zeros(3)]).requires_grad_()
    given = list(zip(gradients((4, 6)), [g * 0.01 for g in gradients((5,))], strict=True))
    ours, theirs = make([flat]), make(apart)
    ours.bind({flat: Layout([Whole("a", (4, 6)), Whole("b", (5,))], [Slice(0, 0, 24, 0), Slice(1, 0, 5, 24)])})
    for pair in given:
        for parameter, gradient in zip(apart, pair, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        flat.grad = torch.cat([*(p.grad.flatten() for p in apart), torch.zeros(3)])  # type: ignore[union-attr]
        ours.step()
        theirs.step()
    assert torch.allclose(flat[:29], torch.cat([p.flatten() for p in apart]), atol=1e-6)


@pytest.mark.parametrize(("start", "numel"), [(0, 24), (3, 2), (3, 3), (3, 14), (6, 12), (8, 16), (23, 1), (5, 8)])
def test_rectangles_cover_a_range_of_a_matrix(start: int, numel: int) -> None:
    matrix = torch.arange(24).view(4, 6)
    flat = torch.cat([torch.full((2,), -1), matrix.flatten()[start : start + numel]])
    seen = []
    for row, column, view in rectangles(Slice(0, start, numel, 2), 6, flat):
        assert torch.equal(view, matrix[row : row + view.shape[0], column : column + view.shape[1]])
        seen += view.flatten().tolist()
    assert seen == list(range(start, start + numel))


def test_an_empty_row_and_column_are_left_alone() -> None:
    """Of a dead channel that feeds a dead one: their product is too small for fp32."""
    parameter = torch.full((64, 64), 2.0, requires_grad=True)
    gradient = np.random.default_rng(0).normal(size=(64, 64)) * 1e-3
    gradient[3], gradient[:, 5] = 0, 0
    after = run(Adafactor([parameter], lr=LR, betas=(0.0, 0.9)), parameter, [gradient] * 3)
    assert np.isfinite(after).all() and (after[3] == 2).all() and (after[:, 5] == 2).all() and (after[4, 6:] != 2).all()


def test_a_mean_is_the_same_by_any_number_of_threads() -> None:
    values = torch.rand(49_408, generator=torch.Generator().manual_seed(0))  # the rows of CLIP's embedding of tokens
    threads = torch.get_num_threads()
    plain, ours = set(), set()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        plain.add(float(values.mean()))
        ours.add(float(_mean(values)))
    torch.set_num_threads(threads)
    assert len(plain) > 1 and len(ours) == 1, "torch's own differs"
    assert ours.pop() == pytest.approx(float(values.double().mean()), rel=1e-6)


def test_the_engine_makes_the_state_that_the_optimizer_would() -> None:
    flat = torch.zeros(7, requires_grad=True)
    optimizer = Adafactor([flat], betas=(0.9, 0.99))
    made = _new_state(optimizer, optimizer.param_groups[0], flat)
    flat.grad = torch.zeros_like(flat)
    optimizer.step()
    assert {k: (v.dtype, v.shape) for k, v in made.items()} == {k: (v.dtype, v.shape) for k, v in optimizer.state[flat].items()}
