"""`python -m logitcache`."""

import sys

from logitcache.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
