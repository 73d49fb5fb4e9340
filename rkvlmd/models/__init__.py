"""What a model is: manifests, families, geometry and prompts; pure, plain integers."""
