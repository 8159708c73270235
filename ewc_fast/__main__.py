"""``python -m ewc_fast``: the same as ``ewc-fast``."""

from ewc_fast.cli import main

raise SystemExit(main())
