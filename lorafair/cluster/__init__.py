"""The machine around a process: where it runs, Slurm, signals, and a watchdog over what waits in vain."""
