"""What is computed once and found again by later runs: decoded images and tokens, in files mapped into memory."""
