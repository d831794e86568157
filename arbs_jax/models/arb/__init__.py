"""The ARB model: its parts, and the whole."""
