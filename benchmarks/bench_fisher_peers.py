"""Fisher diagonals by other libraries and plain PyTorch, beside ewc_fast; see bench_fisher.py."""

from __future__ import annotations

from functools import partial

from bench_fisher import suite
from fisher_models import FULL
from fisher_table import table
from harness import script

if __name__ == "__main__":
    script(partial(suite, peers=True), parts=tuple(FULL), show=table)
