"""Run a federation, or a comparison: python train.py conf/demo.yaml [key=value ...]; python train.py --help."""

from lorafair.cli import entry

if __name__ == "__main__":
    entry()
