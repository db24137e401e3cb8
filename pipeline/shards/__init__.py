"""Stage 1: collections of images become WebDataset tar shards with an index, a table of shards and a manifest."""
