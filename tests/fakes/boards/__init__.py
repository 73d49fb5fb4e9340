"""Trees of boards as ``rkvlmctl doctor --root`` reads them, built from what is known of each.

None was recorded on a board: the names and formats of the entries are those of
the kernel and of the driver's source, the values are plausible ones.
"""
