"""What is learned: a target and weighted terms."""

from vjepa.objectives.build import build_objective
from vjepa.objectives.config import ObjectiveConfig
from vjepa.objectives.jepa import JEPA, Result
from vjepa.objectives.terms import TERMS, build_terms, register_term

__all__ = ["JEPA", "TERMS", "ObjectiveConfig", "Result", "build_objective", "build_terms", "register_term"]
