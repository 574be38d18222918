"""What may be said next: the messages, the net of one turn, one party's part of it, and the session."""
