"""Attention: `api` checks arguments and chooses among `dense`, `tiled` and `fused`.

An implementation is a function of query, key, value, kernel, factor and visibility, which have
been checked: `kernel` turns logits into weights, `factor` multiplies the query and has every scale
in it.
"""
