"""Who runs which piece, and who hears whom: pure data, standard library only."""
