"""Google's .npz files. Numbers were compared with timm's reading of the same files by hand: 4e-16 for ViT, hybrid and MAP, 2e-15 for BiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats_google_files import big_transfer, big_vision, hybrid, vit_jax
from formats_models import VIT, assert_same_state, images, make

from pipeline.core.errors import CheckpointError
from pipeline.models.formats import load, read

JAX = {**VIT, "activation": "gelu-tanh"}
HYBRID = {**JAX, "patch": 8, "pixels": 16, "stem": (2, 1)}
FILES: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "vit": ("vit", JAX, lambda state: vit_jax(state, 2, 2)),
    "vit of in21k": ("vit", {**JAX, "representation": 12}, lambda state: vit_jax(state, 2, 2)),
    "vit without a head": ("vit", {**JAX, "classes": 0}, lambda state: vit_jax(state, 2, 2)),
    "hybrid": ("vit", HYBRID, lambda state: hybrid(state, 2, 2, (2, 1))),
    "big_vision": ("vit", JAX, lambda state: big_vision(state, 2, 2)),
    "big_vision gap": ("vit", {**JAX, "pool": "gap"}, lambda state: big_vision(state, 2, 2)),
    "big_vision map": ("vit", {**JAX, "pool": "map"}, lambda state: big_vision(state, 2, 2, scan=True)),
    "bit": ("bit", {"depths": (2, 1), "factor": 2, "classes": 3, "pixels": 32}, lambda state: big_transfer(state, (2, 1))),
}


@pytest.mark.parametrize("name", FILES)
def test_reads(name: str, tmp_path: Path) -> None:
    family, options, writer = FILES[name]
    model = make(family, options)
    if name == "big_vision":  # there, the class token has no position
        with torch.no_grad():
            model.pos_embed[:, 0] = 0
    np.savez(tmp_path / "some.npz", **writer(model.state_dict()))
    found = read(str(tmp_path / "some.npz"))
    assert_same_state(found.state, dict(model.state_dict()))
    pixels = model.options.model_dump()["pixels"]
    with torch.no_grad():
        ours = found.load(pixels=pixels)
        assert torch.equal(ours(images(pixels).float()), model(images(pixels).float()))
    assert ours.options.model_copy(update={"mlp": None, "class_token": None}) == model.options.model_copy(update={"class_token": None})
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_training_checkpoints_have_a_prefix(tmp_path: Path) -> None:
    model = make("vit", JAX)
    np.savez(
        tmp_path / "some.npz",
        **{f"opt/target/{n}": a for n, a in vit_jax(model.state_dict(), 2, 2).items()},
        **{"opt/state/step": np.array(3)},
    )
    assert_same_state(read(str(tmp_path / "some.npz")).state, dict(model.state_dict()))


def test_other_pixels_as_google_resizes(tmp_path: Path) -> None:
    from scipy import ndimage

    model = make("vit", JAX)
    np.savez(tmp_path / "some.npz", **vit_jax(model.state_dict(), 2, 2))
    grid = model.pos_embed.detach()[0, 1:].reshape(4, 4, 32).numpy()
    expected = ndimage.zoom(grid, (6 / 4, 6 / 4, 1), order=1).reshape(36, 32)
    found = load(str(tmp_path / "some.npz"), pixels=24).pos_embed.detach()[0]
    assert np.abs(found[1:].numpy() - expected).max() < 1e-5 and torch.equal(found[0], model.pos_embed[0, 0])


def test_bfloat16(tmp_path: Path) -> None:
    """big_vision saves it without a type that NumPy knows."""
    model = make("vit", {**JAX, "pool": "map"})
    arrays = big_vision(model.state_dict(), 2, 2)
    halves = {n: torch.from_numpy(a.copy()).bfloat16().view(torch.int16).numpy().view("V2") for n, a in arrays.items()}
    np.savez(tmp_path / "some.npz", **halves)
    assert_same_state(read(str(tmp_path / "some.npz")).state, {n: t.bfloat16().float() for n, t in model.state_dict().items()})


def test_what_is_missing_is_named_as_google_does(tmp_path: Path) -> None:
    arrays = vit_jax(make("vit", JAX).state_dict(), 2, 2)
    arrays["Transformer/encoderblock_1/LayerNorm_0/gain"] = arrays.pop("Transformer/encoderblock_1/LayerNorm_0/scale")
    arrays["head/bias"] = np.zeros(4, np.float32)
    np.savez(tmp_path / "some.npz", **arrays)
    with pytest.raises(CheckpointError) as refused:
        read(str(tmp_path / "some.npz"))
    assert str(refused.value) == (
        f"{tmp_path}/some.npz: does not fit the model, missing: Transformer/encoderblock_1/LayerNorm_0/scale; unknown: "
        "Transformer/encoderblock_1/LayerNorm_0/gain; of another shape: head/bias (4,) instead of (5,)"
    )


def test_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", **{"embedding/kernel": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(CheckpointError, match=r"is damaged, or no .npz file"):
        read(str(tmp_path / "some.npz"))
