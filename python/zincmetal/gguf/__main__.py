"""``python -m zincmetal.gguf``: runs ``zincmetal inspect``."""

import sys

from ..cli.inspect import main

if __name__ == "__main__":
    sys.exit(main())
