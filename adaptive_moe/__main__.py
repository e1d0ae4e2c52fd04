import sys

from adaptive_moe.cli import main

sys.exit(main())
