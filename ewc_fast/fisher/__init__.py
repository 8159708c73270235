"""The Fisher information of a model: its diagonal, exact for every sample, or the whole matrix."""

from ewc_fast.fisher.batches import Batch
from ewc_fast.fisher.estimator import fisher_diagonal, fisher_report
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
from ewc_fast.fisher.matrix import fisher_matrix, parameter_slices
from ewc_fast.fisher.overlap import fisher_overlap
from ewc_fast.fisher.report import FisherDiagonal, FisherReport
from ewc_fast.fisher.scores import Estimator

__all__ = [
    "Batch",
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "Estimator",
    "ExactLikelihood",
    "FisherDiagonal",
    "FisherReport",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Poisson",
    "fisher_diagonal",
    "fisher_matrix",
    "fisher_overlap",
    "fisher_report",
    "parameter_slices",
]
