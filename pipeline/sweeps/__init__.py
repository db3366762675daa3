"""Many runs from one cache: what a sweep asks for, and each run done once."""
