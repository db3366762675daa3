"""The two passes over a slice of logits as Triton kernels: see `choice`."""
