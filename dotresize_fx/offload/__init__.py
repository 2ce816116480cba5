"""Tensors that wait elsewhere until they are computed with: in files, or in pinned memory of the host."""
