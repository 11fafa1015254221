"""The server: what it hands from round to round, its step on one rank or on all, its optimiser, control variates."""
