"""What runs: samples, the base that fills the cache, the losses, the trainer, the evaluation and the command line.

Two flows, each a straight line: samples -> teacher -> cache, and samples -> cache -> loss -> adapter.
"""
