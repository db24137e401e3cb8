"""Position embeddings of each kind and at each place against short references, and the four conventions of resizing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.func import functional_call

from pipeline.models import create
from pipeline.models.positions import CONVENTIONS, RelativePositions, join_axes, resize_axis, resize_positions, sincos_2d
from pipeline.models.vit import VisionTransformer
from tests.unit.models.peers import error, images, largest_error, randomise

TINY = {"width": 12, "depth": 2, "heads": 3, "mlp": 20, "patch": 4, "pixels": 12, "classes": 5}


def tiny(**options: object) -> VisionTransformer:
    model = create("vit", seed=0, **{**TINY, **options})
    assert isinstance(model, VisionTransformer)
    return model


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- kinds ---


def test_sincos_by_hand() -> None:
    table = sincos_2d(3, 8, tokens=2).double()
    assert table.shape == (1, 11, 8) and not table[0, :2].any()
    for row in range(3):
        for column in range(3):
            expected = [f(at / 10_000 ** (i / 2)) for at in (column, row) for f in (math.sin, math.cos) for i in (0, 1)]
            assert table[0, 2 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-7)
    with pytest.raises(ValueError, match="width: 6 is not a multiple of 4"):
        sincos_2d(3, 6)


def test_axes_by_hand() -> None:
    x, y = draw(2, 3, 4), draw(2, 3, 4) + 5
    joined = join_axes(x, y, tokens=1)
    assert joined.shape == (2, 10, 8) and not joined[:, 0].any()
    for layer, row, column in ((0, 0, 2), (1, 2, 1)):
        assert torch.equal(joined[layer, 1 + 3 * row + column], torch.cat([x[layer, column], y[layer, row]]))


def test_relative_attention_by_hand() -> None:
    """softmax((q k + q r) / sqrt(d)) v with r chosen by p_q - p_k, patch after patch (appendix D.4)."""
    model = randomise(tiny(positions="relative"))
    attention = model.blocks[0].attn
    x = draw(2, 10, 12)
    q, k, v = attention.qkv(x).split(12, dim=2)
    out = torch.zeros(2, 10, 12, dtype=torch.float64)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        logits = torch.zeros(2, 10, 10, dtype=torch.float64)
        for i in range(10):
            for j in range(10):
                keys = k[:, j, part]
                if i and j:  # neither is the class token
                    keys = keys + attention.relative.weight[(j - i) + 8, part]
                logits[:, i, j] = (q[:, i, part] * keys).sum(dim=1) / 2
        out[:, :, part] = logits.softmax(dim=2) @ v[:, :, part]
    assert error(attention(x), attention.proj(out)) < 1e-12
    assert attention.relative.weight.shape == (17, 12)


def test_relative_positions_make_order_matter() -> None:
    """Without any, a permutation of the patches changes nothing; with relative ones only their distances count."""
    turned = images(2, 12).unflatten(2, (3, 4)).flip(2).flatten(2, 3)  # the rows of patches the other way round
    none, relative = randomise(tiny(positions="none")), randomise(tiny(positions="relative"))
    assert error(none(turned), none(images(2, 12))) < 1e-12
    assert error(relative(turned), relative(images(2, 12))) > 1e-4
    logits = RelativePositions(5, 6, 2).double()(draw(1, 2, 1, 3).expand(1, 2, 5, 3))
    assert torch.equal(logits[..., :-1, :-1], logits[..., 1:, 1:]) and not torch.equal(logits[..., 0], logits[..., 1])


# --- places ---


def reference(model: VisionTransformer, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network without positions, and these put in by hand before each block."""
    o = model.options

    def run(prefix: str, *arguments: torch.Tensor) -> torch.Tensor:
        part = {n.removeprefix(f"{prefix}."): p for n, p in parameters.items() if n.startswith(f"{prefix}.")}
        return functional_call(model.get_submodule(prefix), part, arguments)

    def table(layer: int) -> torch.Tensor:
        if o.positions == "sincos-2d":
            return model.pos_embed[0]
        if o.positions == "learned":
            return parameters["pos_embed"][layer]
        rows = [torch.cat([parameters["pos_embed_x"][layer, c], parameters["pos_embed_y"][layer, r]]) for r in range(3) for c in range(3)]
        return torch.stack([torch.zeros(12, dtype=torch.float64), *rows])

    z = torch.cat([parameters["cls_token"].expand(x.shape[0], 1, 12), run("patch_embed", x)], dim=1)
    for layer in range(o.depth):
        if layer == 0 or o.positions_at != "stem":
            z = z + table(layer if o.positions_at == "layers" else 0)
        z = run(f"blocks.{layer}", z)
    return run("head", run("norm", z)[:, 0])


@pytest.mark.parametrize(
    ("kind", "at"),
    [("learned", "stem"), ("learned", "layers"), ("learned", "shared"), ("learned-2d", "stem"), ("learned-2d", "layers"),
     ("learned-2d", "shared"), ("sincos-2d", "stem"), ("sincos-2d", "shared")],
)  # fmt: skip
def test_where_positions_are_added(kind: str, at: str) -> None:
    model = randomise(tiny(positions=kind, positions_at=at))
    assert largest_error(model, lambda parameters, x: reference(model, parameters, x), images(2, 12)) < 1e-12


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"positions": "none"}, 0),
        ({"positions": "learned"}, 10 * 12),
        ({"positions": "learned", "pool": "gap"}, 9 * 12 - 12),  # no class token
        ({"positions": "learned", "positions_at": "layers"}, 2 * 10 * 12),
        ({"positions": "learned", "positions_at": "shared"}, 10 * 12),
        ({"positions": "learned-2d"}, 2 * 3 * 6),
        ({"positions": "learned-2d", "positions_at": "layers"}, 2 * 2 * 3 * 6),
        ({"positions": "relative"}, 2 * 17 * 12),
        ({"positions": "sincos-2d"}, 0),
    ],
)
def test_parameters(options: dict[str, str], extra: int) -> None:
    model = tiny(**options)
    assert model.parameter_count - tiny(positions="none").parameter_count == extra
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}  # fixed ones are not saved


# --- resizing ---


def kernel(old: int, new: int, weigh: Callable[[float], float]) -> np.ndarray:
    """(new, old) weights of pixel centres at (i + 1/2) old / new - 1/2, the border repeated; `weigh` is of the distance."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 2, math.floor(at) + 4):
            matrix[i, min(max(j, 0), old - 1)] += weigh(abs(at - j))
    return matrix


def linear(d: float) -> float:
    return max(0.0, 1 - d)


def cubic(d: float) -> float:
    """Keys' kernel with a = -3/4."""
    a = -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resized(grid: np.ndarray, new: int, convention: str) -> np.ndarray:
    """(n, n, D) to (new, new, D), without torch."""
    old = grid.shape[0]
    match convention:
        case "google":
            return ndimage.zoom(grid, (new / old, new / old, 1), order=1)  # as in Google's code
        case "timm-hybrid":
            channels = [
                Image.fromarray(grid[..., d].astype(np.float32)).resize((new, new), Image.Resampling.BICUBIC) for d in range(grid.shape[2])
            ]
            return np.stack([np.asarray(channel) for channel in channels], axis=2)  # Pillow smooths when it shrinks
        case _:
            matrix = kernel(old, new, linear if convention == "timm-npz" else cubic)
            return np.einsum("ip,jq,pqd->ijd", matrix, matrix, grid)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (14, 24), (7, 5), (2, 3)])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_resize_positions(convention: str, old: int, new: int) -> None:
    positions = draw(1, 1 + old * old, 6)
    out = resize_positions(positions, new, convention)
    assert out.shape == (1, 1 + new * new, 6) and torch.equal(out[:, 0], positions[:, 0])
    expected = resized(positions[0, 1:].reshape(old, old, 6).numpy(), new, convention)
    np.testing.assert_allclose(out[0, 1:].reshape(new, new, 6).numpy(), expected, atol=1e-6 if convention == "timm-hybrid" else 1e-9)
    assert resize_positions(positions, old, convention) is positions
    for tokens in (0, 2):  # before the grid; and several layers
        several = torch.cat([draw(3, tokens, 6), positions[:, 1:].expand(3, -1, -1)], dim=1)
        torch.testing.assert_close(resize_positions(several, new, convention)[1, tokens:], out[0, 1:], rtol=0, atol=1e-12)
        assert torch.equal(resize_positions(several, new, convention)[:, :tokens], several[:, :tokens])


def test_conventions_differ() -> None:
    grids = [resize_positions(draw(1, 17, 3), 3, convention) for convention in CONVENTIONS]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(grids) for b in grids[:i])


def test_resize_positions_known_values() -> None:
    grid = torch.tensor([9.0, 0, 2, 4, 6]).reshape(1, 5, 1)
    assert resize_positions(grid, 3).flatten().tolist() == [9, 0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert resize_positions(grid.bfloat16(), 3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="pos_embed: 7 rows are not those of a square grid"):
        resize_positions(torch.zeros(1, 7, 2), 3)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_axes_are_resized_as_the_grid_of_them(convention: str) -> None:
    x, y = draw(2, 5, 4), draw(2, 5, 4) - 1
    together = resize_positions(join_axes(x, y), 8, convention)
    torch.testing.assert_close(join_axes(resize_axis(x, 8, convention), resize_axis(y, 8, convention)), together, rtol=0, atol=1e-12)
    assert resize_axis(x, 5, convention) is x
