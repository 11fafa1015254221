"""Run a federation: python train.py conf/demo.yaml [key=value ...]; see --help."""

from lorafair.cli import entry

if __name__ == "__main__":
    entry()
