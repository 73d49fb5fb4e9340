"""Bytes to messages and back; pure, without sockets and without a loop."""
