"""A segment of somebody else's, in a process of its own that has nothing but what it is given."""
