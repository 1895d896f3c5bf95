"""``python -m zincmetal.check``: runs ``zincmetal check``."""

import sys

from ..cli.check import main

if __name__ == "__main__":
    sys.exit(main())
