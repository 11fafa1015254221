"""Compression around any method: codings of rows of numbers, one file each, and the messages made of them."""
