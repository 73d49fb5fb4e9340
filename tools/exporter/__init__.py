"""Turns Hugging Face checkpoints into model folders of ONNX files, without torch."""
