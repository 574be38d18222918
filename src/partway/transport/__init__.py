"""Bytes from here to there: the only sockets."""
