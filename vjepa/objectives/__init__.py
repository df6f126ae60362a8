"""What is learned: a target and weighted terms."""

from vjepa.objectives.jepa import JEPA, ObjectiveConfig, Result
from vjepa.objectives.terms import TERMS, build_terms, register_term

__all__ = ["JEPA", "TERMS", "ObjectiveConfig", "Result", "build_terms", "register_term"]
