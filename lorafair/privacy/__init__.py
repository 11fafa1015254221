"""Differential privacy: what ε a run has, where its noise comes from, and what is clipped before noise is added."""
