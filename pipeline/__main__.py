"""`python -m logitcache` is `logitcache`."""

from logitcache.cli import main

main()
