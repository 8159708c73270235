"""What arguments must be, and every message a user meets when they are not.

Everything here looks before anything is written: a call that raises has changed nothing.
"""

from ewc_fast._checks.arguments import (
    decay_rate,
    finite,
    gamma,
    impl,
    in_graph,
    learning_rate,
    non_negative,
    one_of,
    positive_integer,
    seed,
    strength,
)
from ewc_fast._checks.flat import flattenable, like_parameters
from ewc_fast._checks.importance import IMPORTANCES, state_importance
from ewc_fast._checks.lora import low_rank_delta
from ewc_fast._checks.operands import (
    ENCODED_BLOCK,
    Operand,
    Operation,
    TensorList,
    as_list,
    dense,
    kind,
    operands,
    state_dtype,
)
from ewc_fast._checks.overlap import some_information, two_fishers
from ewc_fast._checks.parameters import (
    STATE_FIELDS,
    STORAGES,
    ewc_state,
    grown_shape,
    mean_of_squares,
    named_parameters,
    new_fisher,
    trainable_parameters,
)
from ewc_fast._checks.products import squared_convolution, squared_product

__all__ = [
    "ENCODED_BLOCK",
    "IMPORTANCES",
    "STATE_FIELDS",
    "STORAGES",
    "Operand",
    "Operation",
    "TensorList",
    "as_list",
    "decay_rate",
    "dense",
    "ewc_state",
    "finite",
    "flattenable",
    "gamma",
    "grown_shape",
    "impl",
    "in_graph",
    "kind",
    "learning_rate",
    "like_parameters",
    "low_rank_delta",
    "mean_of_squares",
    "named_parameters",
    "new_fisher",
    "non_negative",
    "one_of",
    "operands",
    "positive_integer",
    "seed",
    "some_information",
    "squared_convolution",
    "squared_product",
    "state_dtype",
    "state_importance",
    "strength",
    "trainable_parameters",
    "two_fishers",
]
