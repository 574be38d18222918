"""A network, where it is cut, and the pieces that run. Torch only; knows no party."""
