"""What the properties of storage/ are tried on: seeds, and how many examples a property has."""

from hypothesis import settings
from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)
relaxed = settings(deadline=None, max_examples=10, database=None)
"""For examples that write a cache each."""

many = settings(deadline=None, max_examples=100, database=None)
"""For examples that stay in memory."""
