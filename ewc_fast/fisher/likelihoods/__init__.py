"""What a model's outputs mean: log-probabilities, samples, and exact Fisher directions."""

from ewc_fast.fisher.likelihoods.base import ExactLikelihood, Known, Likelihood, Own
from ewc_fast.fisher.likelihoods.categorical import Categorical
from ewc_fast.fisher.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian
from ewc_fast.fisher.likelihoods.independent import Bernoulli, Poisson
from ewc_fast.fisher.likelihoods.language import CausalLM

NAMED: dict[str, Known] = {
    "categorical": Categorical(),
    "causal_lm": CausalLM(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "heteroscedastic_gaussian": HeteroscedasticGaussian(),
    "poisson": Poisson(),
}

__all__ = [
    "NAMED",
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "ExactLikelihood",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Known",
    "Likelihood",
    "Own",
    "Poisson",
]
