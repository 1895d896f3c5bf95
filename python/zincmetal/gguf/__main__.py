"""``python -m zincmetal.gguf``: the same as ``zincmetal inspect``."""

import sys

from ..cli.inspect import main

if __name__ == "__main__":
    sys.exit(main())
