"""Tools for whoever changes the kernels; no part of the package."""
