"""What passes between the ranks: collectives, agreement on errors and stops, and the bytes of a real federation."""
