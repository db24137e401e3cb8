"""Copies of images within a dataset, and in those of evaluations: found on Ray, published as deny-lists."""
