"""From a person's model to an OP-DAG. Runs where the model is: no daemon imports this room."""

from dag.capture.evaluation import with_evaluation
from dag.capture.training import AUTOCAST_DTYPES, Captured, capture

__all__ = ["AUTOCAST_DTYPES", "Captured", "capture", "with_evaluation"]
