from __future__ import annotations

import math

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.objectives import check_objective
from pipeline.objectives.patches import KEEP, MASK, PatchesOptions, draw_corruption, mean_colors
from tests.unit.objectives.small import PIXELS, a_batch, as_input, gradients, log_softmax, set_up

PATCH, PATCHES = 4, 4


def test_mean_colours_by_hand() -> None:
    """Two patches of 2 x 2 beside each other: means (31.75, 32, 255), (64, 95, 96), so bits (0, 1, 7) and (2, 2, 3)."""
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    images[0, :2, :2] = torch.tensor([[[31, 0, 255], [32, 64, 255]], [[32, 32, 255], [32, 32, 255]]])
    images[0, :2, 2:] = torch.tensor([[[0, 95, 96], [128, 95, 96]], [[64, 95, 96], [64, 95, 96]]])
    assert mean_colors(images, 2).tolist() == [[0 * 64 + 1 * 8 + 7, 2 * 64 + 2 * 8 + 3, 0, 0]]
    white = torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    assert mean_colors(white, 4).tolist() == [[511], [511]]


@pytest.mark.parametrize("n", [4, 9, 196])
def test_exactly_half_of_each_image_is_corrupted(n: int) -> None:
    torch.manual_seed(0)
    corruption, chosen = draw_corruption(20, n, PatchesOptions(), torch.device("cpu"))
    assert (chosen.sum(dim=1) == round(n / 2)).all()
    assert (corruption[~chosen] == KEEP).all(), "what is not predicted stays"


def test_what_becomes_of_the_corrupted() -> None:
    """Appendix B.1.2: 80% the mask embedding, 10% a random other patch, 10% as they are."""
    torch.manual_seed(0)
    corruption, chosen = draw_corruption(100, 1000, PatchesOptions(), torch.device("cpu"))
    own = torch.arange(1000).expand(100, -1)
    shares = {"masked": corruption == MASK, "kept": (corruption == KEEP) & chosen, "swapped": corruption >= 0}
    for name, expected in {"masked": 0.8, "kept": 0.1, "swapped": 0.1}.items():
        assert shares[name].sum().item() / 50_000 == pytest.approx(expected, abs=0.007)  # four standard deviations of the first
    assert not (corruption == own).any(), "another patch is never the patch itself"
    swapped = corruption[corruption >= 0]
    assert swapped.max() <= 999 and swapped.float().mean().item() == pytest.approx(499.5, abs=16) and len(swapped.unique()) > 950
    counts = chosen.sum(dim=0).float()
    assert counts.std().item() == pytest.approx(math.sqrt(100 * 0.25), rel=0.1), "any patch as likely as another"


def test_masked_patches_begin_with_a_uniform_guess() -> None:
    model, objective = set_up("masked-patches", fresh=True)
    torch.manual_seed(0)
    assert objective.loss(model, a_batch())[0].item() == pytest.approx(math.log(512), rel=1e-6)


def test_masked_patches() -> None:
    model, objective = set_up("masked-patches")
    batch = a_batch()
    torch.manual_seed(2)
    loss, metrics = objective.loss(model, batch)
    torch.manual_seed(2)
    corruption, chosen = draw_corruption(4, PATCHES, PatchesOptions(), torch.device("cpu"))
    logits = model(as_input(batch), corruption=corruption)
    losses, hits = [], []
    for b, patch in chosen.nonzero().tolist():
        top, left = PATCH * (patch // 2), PATCH * (patch % 2)
        square = batch.images[b, top : top + PATCH, left : left + PATCH].double().mean(dim=(0, 1))
        red, green, blue = (int(level) >> 5 for level in square)
        losses.append(-log_softmax(logits[b, patch])[64 * red + 8 * green + blue].item())
        hits.append(int(logits[b, patch].argmax()) == 64 * red + 8 * green + blue)
    assert len(losses) == 8
    assert loss.item() == pytest.approx(sum(losses) / 8, rel=1e-6) and metrics["top1"].item() == pytest.approx(sum(hits) / 8)
    assert objective.count(batch).item() == 4
    loss.backward()
    assert all(gradients(model).values())


@pytest.mark.parametrize("name", ["masked-patches", "mae"])
def test_draws_follow_the_seed_alone(name: str) -> None:
    model, objective = set_up(name)
    losses = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        losses.append(objective.loss(model, a_batch())[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("normalise", [True, False])
def test_mae(normalise: bool) -> None:
    """Section 3: the mean squared error in pixel space, on the masked patches alone."""
    model, objective = set_up("mae", {"normalise": normalise})
    batch = a_batch()
    torch.manual_seed(2)
    loss, metrics = objective.loss(model, batch)
    torch.manual_seed(2)
    predicted, mask = model(as_input(batch), torch.rand(4, PATCHES))
    assert (mask.sum(dim=1) == 3).all()
    errors = []
    for b, patch in mask.nonzero().tolist():
        top, left = PATCH * (patch // 2), PATCH * (patch % 2)
        wanted = as_input(batch)[b, :, top : top + PATCH, left : left + PATCH].permute(1, 2, 0).flatten()  # rows, columns, channels
        if normalise:
            wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt()
        errors.append((predicted[b, patch].detach() - wanted).square().mean().item())
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-6) and metrics == {}
    assert objective.count(batch).item() == 4
    loss.backward()
    assert all(gradients(model).values()), "encoder, mask token and decoder"


def test_maes_first_loss() -> None:
    """Targets have variance (n - 1) / n, for each of n values is divided by the unbiased deviation. Of the predictions: a normed
    token of width E times xavier's weights, of variance 2 / (E + n), gives 2 E / (E + n). Both know nothing of each other."""
    n, width, batch = PATCH**2 * 3, 64, a_batch(range(16))
    model, objective = set_up("mae", fresh=True, decoder_width=width)
    losses = []
    for seed in range(20):
        model = type(model)(model.options).double() if seed else model
        losses.append(objective.loss(model, batch)[0].item())
    assert sum(losses) / 20 == pytest.approx((n - 1) / n + 2 * width / (width + n), rel=0.1)
    torch.nn.init.zeros_(model.decoder_pred.weight)  # type: ignore[union-attr,arg-type]
    assert objective.loss(model, batch)[0].item() == pytest.approx((n - 1) / n, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("masked-patches", {"corrupt": 0}, "pretrain.objective.corrupt: 0 should be greater than 0"),
        ("masked-patches", {"masked": 0.8, "swapped": 0.5}, r"pretrain.objective.swapped: 0.5 and masked \(0.8\) are parts of the same"),
        ("mae", {"normalise": "yes"}, "pretrain.objective.normalise: 'yes' should be true or false"),
        ("mae", {"mask": 0.75}, r"pretrain.objective.mask: no such key \(allowed: name, normalise\)"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(name, arguments)


def test_all_of_the_patches_may_be_corrupted() -> None:
    check_objective("masked-patches", {"corrupt": 1, "masked": 0.9, "swapped": 0.1})
    _, chosen = draw_corruption(3, PIXELS, PatchesOptions(corrupt=1), torch.device("cpu"))
    assert chosen.all()
