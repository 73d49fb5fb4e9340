"""The small world of shapes and letters that the demo model is trained on."""
