"""Measurements behind docs/performance.md; a package, so that no installed one of this name comes first."""
