"""What ``tools/bench`` measures: daemon, first token, token path, decoding speed, pictures."""
