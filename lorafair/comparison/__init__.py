"""Comparisons of methods: the plan from a YAML section, its runs, what they say, the report."""
