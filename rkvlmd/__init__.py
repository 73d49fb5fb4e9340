"""rkvlmd: a server for vision-language models on Rockchip boards."""

__version__ = "0.1.0"
