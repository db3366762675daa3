"""The formulas, and the same without [N, V] memory. Tensors only: imports torch and nothing of this project."""
