from __future__ import annotations

import xml.etree.ElementTree as ET

from pipeline.report.plots import draw_curves, draw_layers, thin


def test_only_what_was_recorded_is_drawn() -> None:
    assert draw_curves([]) == []
    plots = draw_curves([{"step": 1, "train/loss": 2.0}, {"step": 2, "validate/loss": 1.5}])
    assert [plot.title for plot in plots] == ["Loss"]
    assert plots[0].caption == "Loss by step. At the end: training 2, held out 1.5."


def test_figures_are_sound_markup_with_units_and_a_description() -> None:
    history = [{"step": s, "train/top1": 1 - 1 / s, "train/images_per_s": 2000.0, "train/grad_norm": 100.0 / s**2} for s in range(1, 50)]
    for plot in draw_curves(history):
        root = ET.fromstring(plot.svg)
        texts = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert {"step"} < set(texts)
        assert {"top-1, %", "images/s", "2-norm of the gradient"} & set(texts)
        assert root.attrib["aria-label"] == plot.caption
        assert "width" not in root.attrib


def test_the_probe_of_each_layer_names_the_chosen_one() -> None:
    layers = [{"layer": n, "held_out_top1": t, "top1": t - 0.1} for n, t in enumerate((0.5, 0.9, 0.8))]
    plot = draw_layers(layers, 1, "digits")
    assert plot.title == "Linear probe by layer: layer 1 is chosen"
    assert "gets 80.00% of the test images" in plot.caption
    texts = [element.text for element in ET.fromstring(plot.svg).iter() if element.tag.endswith("text")]
    assert {"layer", "top-1, %", "held out", "test", "0", "1", "2"} <= set(texts)


def test_losses_are_named_by_their_objective() -> None:
    history = [{"step": s, "train/loss": 1.0, "train/top1": 0.5, "train/logit_scale": 14.3} for s in (1, 2)]
    units = {
        "classify": "cross-entropy, nats",
        "next-pixel": "nats a pixel",
        "contrastive": "nearest to their own caption, %",
        "other": "loss",
    }
    for objective, unit in units.items():
        plots = draw_curves(history, objective)
        assert [plot.title for plot in plots] == ["Loss", "Accuracy", "Logit scale"]
        assert any(f">{unit}<" in plot.svg for plot in plots)


def test_identifiers_of_two_figures_differ() -> None:
    loss, accuracy = draw_curves([{"step": s, "train/loss": 1.0, "train/top1": 0.5} for s in (1, 2, 3)])
    ids = [{v for e in ET.fromstring(p.svg).iter() for k, v in e.attrib.items() if k == "id"} for p in (loss, accuracy)]
    assert not ids[0] & ids[1]


def test_long_runs_are_thinned_and_keep_their_end() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    few = thin(points)
    assert len(few) <= 602
    assert few[0] == points[0]
    assert few[-1] == points[-1]
