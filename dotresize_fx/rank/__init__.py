"""Reduced-order linears: which rank, in which basis, and the walk that solves for them one after the other."""
