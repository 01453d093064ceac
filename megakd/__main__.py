"""`python -m megakd COMMAND`."""

import sys

from megakd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
