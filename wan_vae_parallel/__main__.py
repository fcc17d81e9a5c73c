"""``python -m wan_vae_parallel``."""

import sys

from .cli import main

sys.exit(main())
