"""A job's model and its OP-DAG, tried side by side on the first micro-batch before the job goes anywhere."""

from fusion.trial.evaluation import evaluates_otherwise, evaluating
from fusion.trial.model import Trial, try_once
from fusion.trial.op_dag import written_by
from fusion.trial.training import compare_training, compared_parameters

__all__ = [
    "Trial",
    "compare_training",
    "compared_parameters",
    "evaluates_otherwise",
    "evaluating",
    "try_once",
    "written_by",
]
