"""Models: what is computed between a batch's token ids and its logits."""
