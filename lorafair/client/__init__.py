"""What clients do: local training, several of them side by side on one rank."""
