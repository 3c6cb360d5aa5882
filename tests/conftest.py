"""Shared by all tests: what they assert is what code does, never how fast a machine that others use too does it."""

import hypothesis

hypothesis.settings.register_profile("evenhand", deadline=None)
hypothesis.settings.load_profile("evenhand")
