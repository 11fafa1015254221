"""The server step: one file a method; base.py says what a method is, solvers/ how LoRA-FAIR's problems are solved."""
