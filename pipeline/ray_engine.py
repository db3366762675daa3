"""Shares of a precompute job handed out by Ray Data, to actors that load the base once.

Owns nothing but that arrangement. Must not know units or caches.
"""

from .filler import Tell
from .job import JobReport, JobSpec


def run_on_ray(spec: JobSpec, num_workers: int | None, tell: Tell) -> JobReport:
    raise NotImplementedError
