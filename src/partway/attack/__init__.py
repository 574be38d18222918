"""What a dishonest party can do with what it saw."""
