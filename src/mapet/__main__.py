"""``python -m mapet`` is ``mapet``."""

import sys

from mapet.cli import main

sys.exit(main())
