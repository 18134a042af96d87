"""Attention over paged KV: references in plain torch and the paths that serve."""
