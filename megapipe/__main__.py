"""`python -m megapipe` is the command `megapipe`."""

import sys

from megapipe.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
