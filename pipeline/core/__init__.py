"""The leaf: errors, units, storage, ranks, tracking and progress. Imports nothing above it."""
