"""Messages to bytes and back: `docs/wire-format.md` is the specification."""
