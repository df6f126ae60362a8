"""Heads that learn side by side: one reading of the features trains a whole grid of learning rates and weight decays.

Any module is a head, and any loss will do. Batches are a function of the step, and so are schedules and noise: a fit
that is stopped goes on where it was, and two ranks that split every batch learn what one process learns.
"""

from evals.grid.draws import Draws, derived_seed, generator
from evals.grid.fit import Batches, HeadGrid, Loss, fit_grid
from evals.grid.noise import ChannelDropout, Place
from evals.grid.score import MAX_OVER_HEADS, Choice, Meter, choose, score_heads
from evals.grid.settings import SGD, AdamW, LearningRates, Optim, Schedule, Setting, grid
from evals.grid.state import FORMAT_VERSION, GridStateError, StateFile, read_state, write_state

__all__ = [
    "FORMAT_VERSION",
    "MAX_OVER_HEADS",
    "SGD",
    "AdamW",
    "Batches",
    "ChannelDropout",
    "Choice",
    "Draws",
    "GridStateError",
    "HeadGrid",
    "LearningRates",
    "Loss",
    "Meter",
    "Optim",
    "Place",
    "Schedule",
    "Setting",
    "StateFile",
    "choose",
    "derived_seed",
    "fit_grid",
    "generator",
    "grid",
    "read_state",
    "score_heads",
    "write_state",
]
