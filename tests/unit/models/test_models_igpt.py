"""iGPT against `transformers`, and against the paper's equations where it has no counterpart (BERT, the probe's layers)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from pipeline.core.errors import ConfigError
from pipeline.models import create
from pipeline.models.fused import RMSNorm, quick_gelu
from pipeline.models.igpt import IGPT
from pipeline.models.model import flops

TINY = {"width": 12, "depth": 3, "heads": 2, "pixels": 5, "colors": 7}
EXACT = 1e-12


def tiny(seed: int = 0, scale: float = 1.0, **options: object) -> IGPT:
    """In fp64, every parameter random, so that nothing hides in zeros; the embeddings x `scale`."""
    model = create("igpt", seed=seed, **{**TINY, **options}).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.5 * noise if "norm" in name else 0.4 * noise)
        for table in (model.wte.weight, model.wpe.weight, model.sos):
            table.mul_(2.5 * scale)
    return model


def pixels(model: IGPT, batch: int = 3, length: int | None = None, seed: int = 5) -> torch.Tensor:
    o = model.options
    return torch.randint(o.colors, (batch, length or o.pixels**2), generator=torch.Generator().manual_seed(seed))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def hugging_face(model: IGPT) -> ImageGPTForCausalImageModeling:
    """The same weights in `transformers`: (in, out) kernels, biases everywhere, sos the last row of wte."""
    o = model.options
    theirs = ImageGPTForCausalImageModeling(ImageGPTConfig(
        vocab_size=o.colors + 1, n_positions=o.pixels**2, n_embd=o.width, n_layer=o.depth, n_head=o.heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="sdpa" if ImageGPTForCausalImageModeling._supports_sdpa else "eager",
    )).double()  # fmt: skip
    w = model.state_dict()
    state = {
        "transformer.wte.weight": torch.cat([w["wte.weight"], w["sos"].unsqueeze(0)]),
        "transformer.wpe.weight": w["wpe.weight"],
        "transformer.ln_f.weight": w["norm.weight"],
        "lm_head.weight": w["head.weight"],
    }
    for n in range(o.depth):
        for a, b in NAMES.items():
            state[f"transformer.h.{n}.{b}.weight"] = w[f"blocks.{n}.{a}.weight"].T if "." in a else w[f"blocks.{n}.{a}.weight"]
            if "." in a:
                out = w[f"blocks.{n}.{a}.weight"].shape[0]
                state[f"transformer.h.{n}.{b}.bias"] = w.get(f"blocks.{n}.{a}.bias", torch.zeros(out))
    theirs.load_state_dict(state)
    return theirs


NAMES = {
    "norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def shifted(model: IGPT, tokens: torch.Tensor) -> torch.Tensor:
    """[sos, x_0 .. x_(N-2)], as `transformers` wants it."""
    return torch.cat([torch.full((len(tokens), 1), model.options.colors), tokens[:, :-1]], dim=1)


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("s", (76_571_648, 77_227_008, 78_144_512)),
        ("m", (455_157_760, 456_468_480, 458_303_488)),
        ("l", (1_362_250_752, 1_364_216_832, 1_366_969_344)),
        ("xl", (6_801_438_720, 6_805_370_880, 6_810_875_904)),
    ],
)
def test_parameters(size: str, counts: tuple[int, ...]) -> None:
    for side, count in zip((32, 48, 64), counts, strict=True):
        assert create(f"igpt_{size}", pixels=side, device="meta").parameter_count == count
    assert create("igpt_s", bias=True, device="meta").parameter_count == 76_571_648 + 9 * 512 * 24
    assert create("igpt_s", classes=10, device="meta").parameter_count == 76_571_648 + 10 * 513


def test_flops_are_counted() -> None:
    """12 D^2 a token and layer, the head, and attention's two N x N products: iGPT-S at 32 x 32."""
    n, d, layers, k = 1024, 512, 24, 512
    assert flops(create("igpt_s", device="meta")) == pytest.approx(2 * n * (12 * d * d * layers + d * k) + 4 * n * n * d * layers, rel=1e-9)


@pytest.mark.parametrize("size", ["igpt", "igpt_s"])
def test_initialised_as_openai_does(size: str) -> None:
    model = create(size, seed=3, classes=4, bias=size == "igpt", **({} if size == "igpt_s" else {**TINY, "width": 64}))
    d, layers = model.options.width, model.options.depth
    stds = {"wte": 0.02, "wpe": 0.01, "sos": 0.02, "attn.qkv": d**-0.5, "attn.proj": (d * layers) ** -0.5, "mlp.fc1": 0.02, "mlp.fc2": 0.02}
    for name, p in model.named_parameters():
        if "bias" in name or name.startswith(("head", "classifier")):
            assert not p.any(), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            std = next(s for key, s in stds.items() if key in name)
            assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_the_first_loss_is_ln_512() -> None:
    model = create("igpt", seed=0, pixels=6, classes=5, width=16, depth=2, heads=2)
    tokens = torch.randint(512, (2, 36))
    for masked in (None, torch.rand(2, 36) < 0.5):
        logits, classes = model(tokens, masked=masked, classify=True)
        assert torch.equal(logits, torch.zeros(2, 36, 512)) and torch.equal(classes, torch.zeros(2, 5))
        assert F.cross_entropy(logits.flatten(0, 1).double(), tokens.flatten()).item() == pytest.approx(math.log(512), abs=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("shape", [{}, {"width": 20, "heads": 4, "pixels": 3, "depth": 2, "colors": 11}])
def test_as_transformers_does(bias: bool, scale: float, shape: dict[str, int]) -> None:
    """Logits, hidden states and all gradients; also of a sequence that ends early."""
    ours = tiny(scale=scale, bias=bias, **shape)
    theirs = hugging_face(ours)
    for length in (ours.options.pixels**2, 7):
        tokens = pixels(ours, length=length)
        found, expected = ours(tokens), theirs(shifted(ours, tokens)).logits
        assert far(found, expected) < EXACT
        ours.zero_grad(), theirs.zero_grad()
        for logits in (found, expected):
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        colors = ours.options.colors
        assert far(ours.sos.grad, gradients["transformer.wte.weight"][colors]) < EXACT
        assert far(ours.wte.weight.grad, gradients["transformer.wte.weight"][:colors]) < EXACT
        assert far(ours.wpe.weight.grad, gradients["transformer.wpe.weight"]) < EXACT
        assert far(ours.norm.weight.grad, gradients["transformer.ln_f.weight"]) < EXACT
        assert far(ours.head.weight.grad, gradients["lm_head.weight"]) < EXACT
        for name, p in ours.blocks.named_parameters():
            n, module, kind = name.split(".", 1)[0], *name.split(".", 1)[1].rsplit(".", 1)
            grad = gradients[f"transformer.h.{n}.{NAMES[module]}.{kind}"]
            # A bias of the keys moves all logits of a query alike, so its gradient is zero, up to rounding.
            parts = [(p.grad, grad)]
            if name.endswith("qkv.bias"):
                d = ours.options.width
                parts = [(p.grad[:d], grad[:d]), (p.grad[2 * d :], grad[2 * d :])]
                assert p.grad[d : 2 * d].abs().max() < EXACT * p.grad.abs().max()
            for a, b in parts:
                assert far(a, b.T if b.ndim == 2 else b) < EXACT, name


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_features_of_every_layer(scale: float) -> None:
    """The mean of RMSNorm_l(h^l) over [sos, x_0 .. x_(N-2)], h^l as `transformers` gives them; the last it has normalised itself."""
    ours = tiny(scale=scale)
    tokens = pixels(ours)
    hidden = hugging_face(ours).transformer(shifted(ours, tokens), output_hidden_states=True).hidden_states
    gains = [block.norm1.weight for block in ours.blocks]
    expected = [(h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * g).mean(1) for h, g in zip(hidden[:-1], gains, strict=True)]
    expected.append(hidden[-1].mean(1))
    found = ours.layers(tokens)
    assert len(found) == 4
    for layer, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert far(a, b) < EXACT
        assert torch.equal(ours.features(tokens, layer), a)
    assert torch.equal(ours.features(tokens), found[1])


def reference(w: dict[str, torch.Tensor], heads: int, h: torch.Tensor) -> torch.Tensor:
    """n^L of h^0 (B, N, D) without a causal mask, written out from section 2.3; no biases."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]

    for n in range(3):
        q, k, v = (norm(h, f"blocks.{n}.norm1") @ w[f"blocks.{n}.attn.qkv.weight"].T).chunk(3, -1)
        mixed = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            mixed.append((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c)
        h = h + torch.cat(mixed, -1) @ w[f"blocks.{n}.attn.proj.weight"].T
        m = norm(h, f"blocks.{n}.norm2") @ w[f"blocks.{n}.mlp.fc1.weight"].T
        h = h + m * torch.sigmoid(1.702 * m) @ w[f"blocks.{n}.mlp.fc2.weight"].T
    return norm(h, "norm")


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("length", [25, 8])
def test_bert(scale: float, length: int) -> None:
    model = tiny(scale=scale, classes=4)
    tokens, masked = pixels(model, length=length), torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.3
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    n = reference(w, 2, w["wte.weight"][tokens] * ~masked.unsqueeze(-1) + w["wpe.weight"][:length])
    expected, logits = n @ w["head.weight"].T, model(tokens, masked=masked)
    assert far(logits, expected) < EXACT
    for outputs in (logits, expected):
        F.cross_entropy(outputs[masked], tokens[masked]).backward()
    for name, p in model.named_parameters():
        if name == "sos" or name.startswith("classifier"):
            assert p.grad is None
        else:
            assert far(p.grad, w[name].grad) < EXACT, name
    both = model(tokens, masked=masked, classify=True)
    assert torch.equal(both[0], logits)
    assert far(both[1], n.mean(1) @ w["classifier.weight"].T + w["classifier.bias"]) < EXACT


def test_what_is_masked_is_not_seen_and_what_comes_later_neither() -> None:
    model = tiny()
    tokens = pixels(model)
    other = tokens.clone()
    other[:, 11] = (other[:, 11] + 1) % 7
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, 11] = True
    assert torch.equal(model(tokens, masked=masked), model(other, masked=masked))
    assert not torch.equal(model(tokens, masked=~masked), model(other, masked=~masked))
    assert torch.equal(model(tokens)[:, :12], model(other)[:, :12])
    assert not torch.equal(model(tokens)[:, 12:], model(other)[:, 12:])


def test_a_bert_model_probes_and_classifies_all_pixels_unmasked() -> None:
    model = tiny(masked=True, classes=4)
    tokens = pixels(model)
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    for a, b in zip(model(tokens, classify=True), model(tokens, masked=nothing, classify=True), strict=True):
        assert torch.equal(a, b)
    w = model.state_dict()
    n = reference(w, 2, w["wte.weight"][tokens] + w["wpe.weight"])
    assert far(model.features(tokens, 3), n.mean(1)) < EXACT


def test_classifies_from_the_sequence_that_generates() -> None:
    model = tiny(classes=4)
    tokens = pixels(model)
    logits, classes = model(tokens, classify=True)
    assert torch.equal(logits, model(tokens))
    assert far(classes, model.classifier(model.features(tokens, 3))) < EXACT
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 7
    assert torch.equal(model(other, classify=True)[1], classes)


def test_bf16_is_within_its_rounding() -> None:
    """Of the same weights, which bf16 holds exactly; 2^-8 is one rounding, and errors of several add up as their squares do."""
    model = create("igpt", seed=0, **TINY).bfloat16()
    with torch.no_grad():
        model.head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        model.wte.weight.mul_(20)
    tokens = pixels(model)
    found = model(tokens).double()
    expected = model.double()(tokens)
    assert found.isfinite().all() and ((found - expected).norm() / expected.norm()).item() < 2 * 2**-8
    with torch.autocast("cpu", dtype=torch.bfloat16):  # fp32 weights, as in training
        found = model.float()(tokens).double()
    assert ((found - expected).norm() / expected.norm()).item() < 2 * 2**-8


def test_compiled_as_eager() -> None:
    model = tiny(depth=1)
    tokens = pixels(model)
    compiled = torch.compile(model)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        gradients.append([logits, *(p.grad.clone() for p in model.parameters())])
    assert all(far(b, a) < EXACT for a, b in zip(*gradients, strict=True))


def test_gradients_written_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(5, eps=1e-5).double()
    nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(quick_gelu, x)
    assert torch.autograd.gradcheck(lambda x, g: torch.func.functional_call(norm, {"weight": g}, x), (x, norm.weight))
    assert far(norm(x), nn.RMSNorm.forward(norm, x)) < EXACT
    with torch.no_grad():
        assert far(quick_gelu(x), x * torch.sigmoid(1.702 * x)) < EXACT
    half = torch.randn(2, 5).bfloat16()
    assert torch.equal(norm.bfloat16()(half), nn.RMSNorm.forward(norm, half))


def test_adapts_to_other_pixels_and_classes() -> None:
    small, large = tiny(classes=3), create("igpt", seed=1, **{**TINY, "pixels": 9, "classes": 4}).double()
    ramp = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij"), -1).reshape(25, 2).double()
    with torch.no_grad():
        small.wpe.weight[:, :2] = ramp
    large.load_state_dict(large.adapt(small.state_dict()))
    halves = torch.stack(torch.meshgrid(torch.arange(9) / 2, torch.arange(9) / 2, indexing="ij"), -1).reshape(81, 2)
    assert far(large.wpe.weight[:, :2], halves.double()) < EXACT
    assert not large.classifier.weight.any() and not large.classifier.bias.any()
    assert torch.equal(large.head.weight, small.head.weight)
    same = tiny(classes=3, seed=9)
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in same.adapt(small.state_dict()).items())
    assert "classifier.weight" not in tiny().adapt(small.state_dict())


def test_dropout_is_for_training_only() -> None:
    model = tiny(dropout=0.5)
    tokens = pixels(model)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert far(model(tokens), tiny()(tokens)) < EXACT


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.width: 10 is not a multiple of heads \(3\)"):
        create("igpt", width=10, heads=3, depth=1)
    with pytest.raises(ConfigError, match=r"model\.patch: no such key"):
        create("igpt_s", patch=4)


def test_a_batch_of_examples() -> None:
    model = tiny()
    (tokens,) = model.example(2)
    assert tokens.shape == (2, 25) and model(tokens).shape == (2, 25, 7)


def test_activations_are_what_autograd_keeps() -> None:
    """Within 5%; what is small beside them (scales a row, log-sum-exps, tokens) is left out."""
    model = create("igpt", seed=0, pixels=8, colors=16, width=64, depth=4, heads=2)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    tokens = pixels(model, batch=2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert loss.requires_grad and sum(kept.values()) / 2 == pytest.approx(model.activations(), rel=0.05)
