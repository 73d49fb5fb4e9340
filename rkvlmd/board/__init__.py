"""The machine as its files tell it: SoC, NPU, clocks, memory, libraries, model files."""
