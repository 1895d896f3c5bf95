"""``python -m zincmetal``: the same as ``zincmetal``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
