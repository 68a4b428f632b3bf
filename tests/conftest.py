"""Settings of all tests: a busy machine must not fail a property; hangs are pytest-timeout's business."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
