"""Helpers that tests of several packages share. Fixtures are in the ``conftest.py`` files, which import from here."""
