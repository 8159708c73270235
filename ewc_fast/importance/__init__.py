"""What a parameter is worth to a finished task, other than by its Fisher information.

Each is used by ``EWC(..., importance=...)``, in the place of the Fisher diagonal: same penalty,
same merge, same kernels.
"""

from ewc_fast.importance.l2 import uniform_importance
from ewc_fast.importance.mas import mas_importance
from ewc_fast.importance.si import ActivePath, PathIntegral

__all__ = ["ActivePath", "PathIntegral", "mas_importance", "uniform_importance"]
