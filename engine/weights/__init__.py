"""Reading models from files: what a model is (`spec`) and its tensors, whatever format they are in."""
