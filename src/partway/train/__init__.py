"""Arithmetic of learning."""
