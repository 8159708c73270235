"""What arguments must be, and every message a user meets when they are not.

Everything here looks before anything is written: a call that raises has changed nothing.
"""

from ewc_fast._checks.arguments import (
    decay_rate,
    finite,
    gamma,
    impl,
    non_negative,
    one_of,
    positive_integer,
    seed,
)
from ewc_fast._checks.flat import flattenable, like_parameters
from ewc_fast._checks.operands import (
    Operand,
    Operation,
    TensorList,
    as_list,
    dense,
    kind,
    operands,
    state_dtype,
)
from ewc_fast._checks.parameters import (
    STATE_FIELDS,
    ewc_state,
    grown_shape,
    named_parameters,
    new_fisher,
    trainable_parameters,
)
from ewc_fast._checks.products import squared_convolution, squared_product

__all__ = [
    "STATE_FIELDS",
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
    "kind",
    "like_parameters",
    "named_parameters",
    "new_fisher",
    "non_negative",
    "one_of",
    "operands",
    "positive_integer",
    "seed",
    "squared_convolution",
    "squared_product",
    "state_dtype",
    "trainable_parameters",
]
