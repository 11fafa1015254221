"""Robust aggregation: which updates a server keeps or shortens before the method combines them, one file each."""
