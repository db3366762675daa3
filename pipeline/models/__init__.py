"""A causal language model as this project meets it: loaded, named by its content, split into body and head, placed."""
