"""Masks as pure functions of step and ordinal, and the door in: Samples -> Batch."""
