"""The machine around a process: where it runs, Slurm, signals, and a watchdog for hung or lost processes."""
