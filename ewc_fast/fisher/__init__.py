"""The diagonal Fisher information of a model, exact for every sample."""

from ewc_fast.fisher.estimator import fisher_diagonal
from ewc_fast.fisher.likelihoods import Likelihood

__all__ = ["Likelihood", "fisher_diagonal"]
