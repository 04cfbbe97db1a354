"""``python -m bnwatch.cli`` is ``bnwatch``."""

import sys

from bnwatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
