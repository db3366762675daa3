"""Precompute: the base runs once over the samples and its records fill a cache. Must not know losses or training."""
