"""Triton kernels, one kind of work a file; imported only where `dispatch` found that they run.

Each kernel's bits depend on its inputs alone: not on tiles, positions, shards, chunks or the split's axis.
"""
