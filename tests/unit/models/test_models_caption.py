"""Caption prediction: causality, the look at the image, and the decoder against a reference written out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.core.errors import ConfigError
from pipeline.models import check_model, create
from pipeline.models.caption import Captioner

V, L = 53, 9
TEXT = {"kind": "transformer", "width": 12, "depth": 2, "heads": 3, "mlp": 20}
TOWERS = {
    "vit": {"pixels": 15, "vision": {"kind": "vit", "patch": 5, "width": 16, "depth": 2, "heads": 2}},
    "resnet": {"pixels": 64, "vision": {"kind": "resnet", "depths": (1, 1, 1, 1), "width": 4}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth sharing out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def captioner(kind: str = "vit", seed: int = 0, **changes: Any) -> Captioner:
    model = create("caption", seed=seed, **{**TOWERS[kind], "text": TEXT, "vocabulary": V, "context": L, **changes})
    assert isinstance(model, Captioner)
    return model


def sample(model: Captioner, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw, pixels = torch.Generator().manual_seed(1), model.options.pixels
    return torch.randn(count, 3, pixels, pixels, generator=draw), torch.randint(0, V, (count, L), generator=draw)


def reference(state: Mapping[str, torch.Tensor], depth: int, heads: int, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder in matrices, (N, D) and (L,) to (L, V): VirTex's three branches, each behind a norm as in CLIP."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        size, out = q.shape[1] // heads, []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits = q[:, part] @ k[:, part].T / math.sqrt(size)
            out.append((logits if hidden is None else logits.masked_fill(hidden, -math.inf)).softmax(1) @ v[:, part])
        return torch.cat(out, 1)

    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    x = state["token_embed.weight"][tokens] + state["pos_embed"][: len(tokens)]
    image = linear(image, "visual_proj")
    for i in range(depth):
        at = f"blocks.{i}"
        x = x + linear(attend(*linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, 1), future), f"{at}.attn.proj")
        q = linear(norm(x, f"{at}.norm_cross"), f"{at}.cross.q")
        x = x + linear(attend(q, *linear(image, f"{at}.cross.kv").chunk(2, 1), None), f"{at}.cross.proj")
        y = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{at}.mlp.fc2")
    return norm(x, "norm") @ state["token_embed.weight"].T


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("n", "d"), [(5, 7), (11, 16)])
def test_decoder_equals_its_reference(n: int, d: int, scale: float) -> None:
    """Logits and gradients; every parameter random."""
    model = captioner(vision={**TOWERS["vit"]["vision"], "width": d * 2, "heads": 1}).text.double()  # type: ignore[dict-item]
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * p.shape[-1] ** -0.5)
    image = scale * torch.randn(2, n, d * 2, generator=draw, dtype=torch.float64)
    tokens = torch.randint(0, V, (2, L), generator=draw)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    ours = model(image, tokens)
    wanted = torch.stack([reference(state, 2, 3, *one) for one in zip(image, tokens, strict=True)])
    assert (ours - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    weights = torch.randn(wanted.shape, generator=draw, dtype=torch.float64)
    for each in (ours, wanted):
        (each * weights).sum().backward()
    for name, p in model.named_parameters():
        gradient = state[name].grad
        assert p.grad is not None and gradient is not None
        assert (p.grad - gradient).abs().max() <= 1e-12 * max(gradient.abs().max().item(), 1e-3), name


@pytest.mark.parametrize("kind", TOWERS)
def test_a_token_sees_those_before_it_and_the_image(kind: str) -> None:
    model = captioner(kind).eval().double()
    images, tokens = sample(model)
    images = images.double()
    logits = model(images, tokens)
    assert logits.shape == (3, L, V)
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % V
    changed = model(images, later)
    torch.testing.assert_close(changed[:, :4], logits[:, :4], rtol=1e-12, atol=1e-13)
    assert (changed[:, 4:] - logits[:, 4:]).abs().amax(2).min() > 1e-6
    torch.testing.assert_close(model(images, tokens[:, :4]), logits[:, :4], rtol=1e-12, atol=1e-13)
    seen = model(images.flip(0), tokens)
    assert (seen[0] - logits[0]).abs().amax(1).min() > 1e-6  # at every place


@pytest.mark.parametrize("kind", TOWERS)
def test_fresh_loss(kind: str) -> None:
    """The head is the embedding, drawn with .02: logits of a normed state have a deviation of .02 sqrt(W)."""
    model = captioner(kind, vocabulary=1009, text={**TEXT, "width": 64, "heads": 1})
    images, _ = sample(model)
    tokens = torch.randint(0, 1009, (3, L), generator=torch.Generator().manual_seed(4))
    loss = F.cross_entropy(model(images, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1009), abs=0.1)


@pytest.mark.parametrize("kind", TOWERS)
def test_all_of_it_is_trained(kind: str) -> None:
    model = captioner(kind)
    images, tokens = sample(model)
    loss = F.cross_entropy(model(images, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.unpenalised >= {name for name, _ in model.named_parameters() if name == "visual.cls_token"}
    assert model.features(images).shape == (3, model.text.visual_proj.in_features)


def test_published() -> None:
    """63 million (section 2.3) of CLIP's text transformer and its embedding, cross-attention on top."""
    for name, visual in (("caption_vit_b32", 87_849_216 - 768 * 512), ("caption_rn50", 23_527_264)):
        model = create(name, device="meta")
        assert isinstance(model, Captioner)
        assert sum(p.numel() for p in model.visual.parameters()) == visual
        cross = sum(p.numel() for n, p in model.text.named_parameters() if "cross" in n or "visual_proj" in n)
        assert sum(p.numel() for p in model.text.parameters()) - cross == 63_165_952
        assert model(*model.example(2)).shape == (2, 77, 49408) and model.activations() > 0


def test_initialisation() -> None:
    state = captioner(text={**TEXT, "width": 96, "depth": 2}).text.state_dict()
    wanted = {"token_embed.weight": 0.02, "blocks.1.cross.q.weight": 96**-0.5, "blocks.1.cross.kv.weight": 96**-0.5}
    wanted |= {"blocks.1.cross.proj.weight": 96**-0.5 / 2, "blocks.1.attn.proj.weight": 96**-0.5 / 2, "blocks.1.attn.qkv.weight": 96**-0.5}
    for name, std in wanted.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.05), name
    assert not any(state[f"blocks.0.cross.{layer}.bias"].any() for layer in ("q", "kv", "proj"))


def test_other_pixels_and_a_shorter_context() -> None:
    old, new = captioner(), captioner(seed=1, pixels=25, context=5)
    new.load_state_dict(new.adapt(old.state_dict()))
    assert new.visual.pos_embed.shape == (1, 26, 16)
    torch.testing.assert_close(new.text.pos_embed, old.text.pos_embed[:5])


def test_refuses_a_bag_of_words() -> None:
    with pytest.raises(ConfigError, match=r"model\.text\.kind"):
        check_model("caption_rn50", {"text": {"kind": "bag-of-words"}})
    with pytest.raises(ConfigError, match=r"model\.embed"):
        check_model("caption_rn50", {"embed": 3})


def test_bf16_and_compiled() -> None:
    model = captioner(text={**TEXT, "depth": 1}, vision={**TOWERS["vit"]["vision"], "depth": 1})  # type: ignore[dict-item]
    images, tokens = sample(model)
    with torch.no_grad():
        exact = model.double()(images.double(), tokens)
        torch.testing.assert_close(torch.compile(model)(images.double(), tokens), exact, rtol=1e-12, atol=1e-14)
        rough = model.bfloat16()(images.bfloat16(), tokens)
    assert (rough.double() - exact).abs().max() < 2**-5 * exact.abs().max()
