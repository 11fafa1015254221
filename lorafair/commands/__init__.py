"""What a user can ask for: one file a subcommand of the command, and the functions of the Python API behind them."""
