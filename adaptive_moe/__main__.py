"""python -m adaptive_moe: the command line."""

import sys

from adaptive_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
