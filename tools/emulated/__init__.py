"""The emulated board: builds it, runs the daemon in it, says what that proves."""
