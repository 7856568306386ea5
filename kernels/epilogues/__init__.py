"""Tile maths: elementwise work and row or column reductions of one score tile, no pointers and no bounds."""
