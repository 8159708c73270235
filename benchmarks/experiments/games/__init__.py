"""Deep Q-learning on a sequence of games: does an agent still play those that it has left?

After figure 3 of Kirkpatrick et al. 2017 (https://doi.org/10.1073/pnas.1611835114), at a size for
two cores. Three games of MinAtar (Young and Tian 2019, https://arxiv.org/abs/1903.03176) take
turns, twice; the scores in all of them are measured as it goes. Three agents are compared: EWC with
task labels given; EWC with labels inferred from the frames by a forget-me-not process; and the same
agent without EWC, labels given. All have the paper's double Q-learning, replay, timers of
exploration, biases and gains for each task, and one network of 67,000 weights for all tasks.

Protocol: blocks of 60,000 frames; Fisher information from 100 minibatches of the replay where a
task is left, one penalty per task, by the proximal mode. Lambda is chosen on a shorter sequence, of
another seed. Scores are normalised so that random play is 0 and 1 is an agent of the same size that
has learned this game alone for as many frames. ``--suite ale`` plays Atari's games by the paper's
network, for days on a CPU.

Where to begin reading: :mod:`.experiment`, then :mod:`.play` and :mod:`.agent`; what is particular
to EWC is in :mod:`.protection`, to inferred labels in :mod:`.forget_me_not`.
"""

from .experiment import run

__all__ = ["run"]
