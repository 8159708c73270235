
from ewc_fast.fisher.batches import Batch
from ewc_fast.fisher.estimator import Estimator, fisher_diagonal
from ewc_fast.fisher.likelihoods import (
    Bernoulli,
    Categorical,
    CausalLM,
    ExactLikelihood,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
)

__all__ = [
    "Batch",
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "Estimator",
    "ExactLikelihood",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Poisson",
    "fisher_diagonal",
]
