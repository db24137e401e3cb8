from __future__ import annotations

from pathlib import Path

from launch.plans import table

ROOT = Path(__file__).parents[3]
RECIPES = ("vit-h14-jft", "igpt-xl", "clip-vit-l14-336")


def test_the_readme_shows_the_plans_as_they_are() -> None:
    """After a change: `python launch/plans.py configs/pretrain/{vit-h14-jft,igpt-xl,clip-vit-l14-336}.yaml`."""
    made = table(tuple(str(ROOT / "configs" / "pretrain" / f"{name}.yaml") for name in RECIPES), (8, 64), "h100")
    assert made in (ROOT / "README.md").read_text()
