"""Frozen-feature evaluations and pictures."""

from evals.embed_folder import read_embedding

__all__ = ["read_embedding"]
