"""The process that finishes the training."""
