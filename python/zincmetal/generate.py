"""``python -m zincmetal.generate``: runs ``zincmetal run``."""

import sys

from .cli.run import main

if __name__ == "__main__":
    sys.exit(main())
