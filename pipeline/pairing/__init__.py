"""A cache and a model that belong together: identity, targets of a batch, and what is measured before step 1."""
