"""Adapters: the table of kinds, attaching and saving them, first values that PEFT lacks, null spaces."""
