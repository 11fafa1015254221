"""Which images there are (sources), which client has which (partition), and their way to the model (loading)."""
