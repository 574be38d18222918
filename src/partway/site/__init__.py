"""The process at a data holder."""
