"""How any objective is optimised: recipes, the loop, checkpoints, processes. Knows no modality."""

from . import parallel
from .checkpoint import CheckpointError, latest_complete
from .config import (
    BatchChange,
    FreezeRule,
    GroupRule,
    OptimizerConfig,
    RecipeError,
    ScheduleConfig,
    SpikePolicy,
    TrainerConfig,
    as_dict,
    dump,
    load_recipe,
)
from .freezing import FreezeRow, apply_freeze
from .guard import LossSpikeError, NonFiniteError
from .layout import Layout, LayoutError, ParallelConfig, lay_out
from .objective import Loader, Metrics, Objective, move
from .progress import ProgressLine
from .replicas import ReplicaError
from .run_directory import RunDirectoryError, environment
from .schedule import fraction
from .state import load_weights, seed_everything
from .trainer import LoaderExhaustedError, train

__all__ = [
    "BatchChange",
    "CheckpointError",
    "FreezeRow",
    "FreezeRule",
    "GroupRule",
    "Layout",
    "LayoutError",
    "Loader",
    "LoaderExhaustedError",
    "LossSpikeError",
    "Metrics",
    "NonFiniteError",
    "Objective",
    "OptimizerConfig",
    "ParallelConfig",
    "ProgressLine",
    "RecipeError",
    "ReplicaError",
    "RunDirectoryError",
    "ScheduleConfig",
    "SpikePolicy",
    "TrainerConfig",
    "apply_freeze",
    "as_dict",
    "dump",
    "environment",
    "fraction",
    "latest_complete",
    "lay_out",
    "load_recipe",
    "load_weights",
    "move",
    "parallel",
    "seed_everything",
    "train",
]
