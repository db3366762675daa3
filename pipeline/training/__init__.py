"""Train: samples and a cache -> an adapter; as a job, as a mixin for trainers, and for a loop of one's own."""
