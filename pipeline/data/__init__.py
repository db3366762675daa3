"""Rows of a data set -> samples: token ids, and which of them are supervised."""
