"""images/s of open_clip's evaluation preprocessing over tar shards, for an environment that has open_clip and webdataset:

python tests/bench/peer_evaluation.py 'SHARDS/{00000..00002}.tar' [--workers 2 --batch 64 --batches 40 --size 224]
"""

from __future__ import annotations

import argparse
import json
import time


def main() -> None:
    import webdataset as wds
    from open_clip.transform import image_transform
    from torch.utils.data import DataLoader

    p = argparse.ArgumentParser()
    p.add_argument("shards")
    for name, default in (("workers", 2), ("batch", 64), ("batches", 40), ("size", 224)):
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    view = image_transform(a.size, is_train=False)
    data = (
        wds.WebDataset(a.shards, shardshuffle=False)
        .decode("pil")
        .rename(image="jpg;png;webp")
        .map(lambda s: (view(s["image"]),))
        .batched(a.batch)
    )
    batches = iter(DataLoader(data, batch_size=None, num_workers=a.workers))
    for _ in range(4):
        next(batches)
    start, images = time.perf_counter(), 0
    for _ in range(a.batches):
        images += len(next(batches)[0])
    print(json.dumps({"peer": "open_clip evaluation", "images_per_s": images / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
