"""Peers of the method: comparisons, re-implemented from their papers, a small file each. Not methods of the product.

Each gives a checkpoint that is evaluated as ours are, and the number of parameters that it would store.
"""
