"""``python -m hunyuan_train``: the same as the console script."""

import sys

from hunyuan_train.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
