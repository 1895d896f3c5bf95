"""``python -m zincmetal.plan``: the same as ``zincmetal plan``."""

import sys

from ..cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
