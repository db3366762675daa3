"""`python -m logitcache.pipeline` is `logitcache`."""

from .cli import main

main()
