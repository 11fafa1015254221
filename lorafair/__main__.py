"""python -m lorafair: the same as the command `lorafair`."""

from lorafair.cli import entry

if __name__ == "__main__":
    entry()
