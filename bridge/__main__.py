"""`python -m bridge` is the command `simple-influence`."""

import sys

from bridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
