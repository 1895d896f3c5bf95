"""``python -m zincmetal.check``: the same as ``zincmetal check``."""

import sys

from ..cli.check import main

if __name__ == "__main__":
    sys.exit(main())
