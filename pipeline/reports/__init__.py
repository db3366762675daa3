"""What a sweep left in its folder -> tables, pictures and pages. Reads files; must not import torch."""
