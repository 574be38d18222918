"""Partway beside its alternatives: what each method reaches and costs, in tables, pictures and on one page."""
