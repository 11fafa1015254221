"""Run a federation: python train.py conf/demo.yaml [key=value ...]; see --help."""

import sys

from lorafair.cli import main

if __name__ == "__main__":
    sys.exit(main())
