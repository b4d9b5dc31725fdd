"""Depth pruning: choosing blocks to drop, and training the rest to make up for them."""
