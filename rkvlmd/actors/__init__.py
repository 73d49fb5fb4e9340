"""Tasks and what they own; no HTTP here."""
