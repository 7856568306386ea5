"""Tile kernels: the maths of one score tile (`epilogues`) in a language that Triton and PyTorch both run (`lang`)."""
