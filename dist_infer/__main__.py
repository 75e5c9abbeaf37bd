"""`python -m dist_infer` is the program `dist-infer`."""

from __future__ import annotations

import sys

from dist_infer.cli.main import main

sys.exit(main())
