"""Hypothesis tries 100 examples of a test, with `pytest --hypothesis-profile=fuzz` many more."""

from hypothesis import settings

settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
