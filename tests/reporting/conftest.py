"""Fixtures of the tests that open pages in a browser."""

from __future__ import annotations

from answer_visits import visit  # noqa: F401
