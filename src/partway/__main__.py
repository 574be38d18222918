"""`python -m partway` is the command `partway`."""

import sys

from partway.cli import main

if __name__ == "__main__":
    sys.exit(main())
