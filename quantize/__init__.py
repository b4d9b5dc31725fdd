"""Mathematics on one layer's tensors: number formats, methods, scale searches. Knows no model, data or sampler."""
