"""Frozen-feature evaluations and pictures."""
