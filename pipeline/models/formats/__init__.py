"""Checkpoints as the world has them, and as the world wants them.

`load(url)` gives the model, whatever the format; `read(url)` its parts; `export(model, url, to)` writes another format. Formats: Hugging
Face, timm (so DeiT, MAE, torchvision's ResNets), Google's .npz, OpenAI's CLIP and iGPT, open_clip.
"""

from pipeline.models.formats.imported import Imported
from pipeline.models.formats.read import load, read
from pipeline.models.formats.write import TARGETS, export

__all__ = ["TARGETS", "Imported", "export", "load", "read"]
