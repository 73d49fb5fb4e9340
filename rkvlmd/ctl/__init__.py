"""rkvlmctl: standard library only."""
