"""Tiled attention: `gradient` joins the two passes, `band` says which tiles they visit."""
