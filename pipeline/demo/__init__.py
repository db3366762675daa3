"""The demo: text every Python carries, a small base, and the main job on them."""
